#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace kolors_fast {
namespace {

#if defined(__x86_64__)
inline bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
inline bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
inline bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif
inline bool has_generic() { return true; }

struct Choice {
    const char *name;
    bool supported;
    Kernels kernels;
};

#define KOLORS_FAST_ADDRESS(name, Arguments) name,
#define KOLORS_FAST_CHOICE(ISA)                                                                                        \
    Choice{#ISA, has_##ISA(), [] {                                                                                     \
               using namespace ISA;                                                                                    \
               return Kernels{KOLORS_FAST_KERNELS(KOLORS_FAST_ADDRESS)};                                               \
           }()},

const Choice &choose() {
#if defined(__x86_64__)
    __builtin_cpu_init();
#endif
    static const Choice choices[] = {KOLORS_FAST_ISAS(KOLORS_FAST_CHOICE)}; // of the build, the best first
    const char *wanted = std::getenv("KOLORS_FAST_CPU_ISA");
    for (const Choice &choice : choices)
        if (wanted && *wanted ? std::string(wanted) == choice.name : choice.supported) {
            if (!choice.supported)
                throw std::runtime_error("KOLORS_FAST_CPU_ISA asks for " + std::string(wanted) +
                                         ", which this CPU does not have");
            return choice;
        }
    if (!wanted || !*wanted)
        throw std::runtime_error("kolors_fast was built for no instruction set of this CPU: KOLORS_FAST_CPU_ISAS");
    throw std::runtime_error(
        "KOLORS_FAST_CPU_ISA must be avx512bf16, avx512, avx2 or generic as this build has them, got " +
        std::string(wanted));
}

const Choice &chosen() {
    static const Choice &choice = choose();
    return choice;
}

} // namespace

const char *isa() { return chosen().name; }

const Kernels &kernels() { return chosen().kernels; }

} // namespace kolors_fast
