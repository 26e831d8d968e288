// Which instruction set the CPU kernels use. Each kernel source is compiled once per set, into its own namespace.
#pragma once

#include "../common/arguments.h"

namespace kolors_fast {

// "avx512", "avx2" or "generic": the best this machine has, or what KOLORS_FAST_CPU_ISA asks for.
// Throws std::runtime_error when the machine or the build lacks what was asked for.
const char *isa();

#define KOLORS_FAST_DECLARE_KERNELS(ISA)                                                                               \
    namespace ISA {                                                                                                    \
    void group_norm_silu_forward(const GroupNormSiluForward &);                                                        \
    void group_norm_silu_backward(const GroupNormSiluBackward &);                                                      \
    void guided_step(const GuidedStep &);                                                                              \
    }

KOLORS_FAST_DECLARE_KERNELS(generic)
#if defined(__x86_64__)
KOLORS_FAST_DECLARE_KERNELS(avx2)
KOLORS_FAST_DECLARE_KERNELS(avx512)
#endif

struct Kernels {
    void (*group_norm_silu_forward)(const GroupNormSiluForward &);
    void (*group_norm_silu_backward)(const GroupNormSiluBackward &);
    void (*guided_step)(const GuidedStep &);
};

// The kernels of isa().
const Kernels &kernels();

} // namespace kolors_fast
