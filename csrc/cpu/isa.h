// Which instruction set the CPU kernels use. Each kernel source is compiled once per set, into its own namespace.
#pragma once

#include "../common/arguments.h"

namespace kolors_fast {

// "avx512bf16", "avx512", "avx2" or "generic": the best this machine has, or what KOLORS_FAST_CPU_ISA asks for.
// Throws std::runtime_error when the machine or the build lacks what was asked for.
const char *isa();

// Every kernel and its arguments.
#define KOLORS_FAST_KERNELS(KERNEL)                                                                                    \
    KERNEL(ada_layer_norm_forward, LayerNormForward)                                                                   \
    KERNEL(ada_layer_norm_backward, LayerNormBackward)                                                                 \
    KERNEL(gated_residual_ada_layer_norm_forward, LayerNormForward)                                                    \
    KERNEL(gated_residual_ada_layer_norm_backward, LayerNormBackward)                                                  \
    KERNEL(group_norm_silu_forward, GroupNormSiluForward)                                                              \
    KERNEL(group_norm_silu_backward, GroupNormSiluBackward)                                                            \
    KERNEL(guided_step, GuidedStep)                                                                                    \
    KERNEL(scale_and_filter, ScaleAndFilter)                                                                           \
    KERNEL(unscale_and_filter, UnscaleAndFilter)                                                                       \
    KERNEL(unscale_grads, UnscaleGrads)                                                                                \
    KERNEL(residual_layer_norm_forward, LayerNormForward)                                                              \
    KERNEL(residual_layer_norm_backward, LayerNormBackward)                                                            \
    KERNEL(geglu_forward, GateForward)                                                                                 \
    KERNEL(geglu_backward, GateBackward)                                                                               \
    KERNEL(swiglu_forward, GateForward)                                                                                \
    KERNEL(swiglu_backward, GateBackward)                                                                              \
    KERNEL(rms_norm_forward, RmsNormForward)                                                                           \
    KERNEL(rms_norm_backward, RmsNormBackward)                                                                         \
    KERNEL(qk_norm_forward, QkNorm)                                                                                    \
    KERNEL(qk_norm_backward, QkNorm)                                                                                   \
    KERNEL(attention, Attention)                                                                                       \
    KERNEL(folded_attention, FoldedAttention)                                                                          \
    KERNEL(pack_linear, PackLinear)                                                                                    \
    KERNEL(linear, Linear)                                                                                             \
    KERNEL(pack_winograd, PackWinograd)                                                                                \
    KERNEL(winograd, Winograd)

#define KOLORS_FAST_DECLARE(name, Arguments) void name(const Arguments &);
#define KOLORS_FAST_POINTER(name, Arguments) void (*name)(const Arguments &);

namespace generic {
KOLORS_FAST_KERNELS(KOLORS_FAST_DECLARE)
}
#if defined(__x86_64__)
namespace avx2 {
KOLORS_FAST_KERNELS(KOLORS_FAST_DECLARE)
}
namespace avx512 {
KOLORS_FAST_KERNELS(KOLORS_FAST_DECLARE)
}
namespace avx512bf16 {
KOLORS_FAST_KERNELS(KOLORS_FAST_DECLARE)
}
#endif

struct Kernels {
    KOLORS_FAST_KERNELS(KOLORS_FAST_POINTER)
};

// The kernels of isa().
const Kernels &kernels();

} // namespace kolors_fast
