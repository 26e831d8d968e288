#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace kolors_fast {
namespace {

#define KOLORS_FAST_ADDRESS(name, Arguments) name,
#define KOLORS_FAST_TABLE(ISA)                                                                                         \
    [] {                                                                                                               \
        using namespace ISA;                                                                                           \
        return Kernels{KOLORS_FAST_KERNELS(KOLORS_FAST_ADDRESS)};                                                      \
    }()

struct Choice {
    const char *name;
    bool supported;
    Kernels kernels;
};

const Choice &choose() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool avx512bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
#endif
    static const Choice choices[] = {
#if defined(__x86_64__)
        {"avx512bf16", avx512bf16, KOLORS_FAST_TABLE(avx512bf16)},
        {"avx512", avx512, KOLORS_FAST_TABLE(avx512)},
        {"avx2", avx2, KOLORS_FAST_TABLE(avx2)},
#endif
        {"generic", true, KOLORS_FAST_TABLE(generic)},
    };
    const char *wanted = std::getenv("KOLORS_FAST_CPU_ISA");
    for (const Choice &choice : choices)
        if (wanted && *wanted ? std::string(wanted) == choice.name : choice.supported) {
            if (!choice.supported)
                throw std::runtime_error("KOLORS_FAST_CPU_ISA asks for " + std::string(wanted) +
                                         ", which this CPU does not have");
            return choice;
        }
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
