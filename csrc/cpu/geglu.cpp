// y = value * gate * Phi(gate), h = [value, gate]
#include "gate.h"
#include "gauss.h"
#include "isa.h"

namespace kolors_fast {
namespace KOLORS_FAST_ISA {
namespace {

struct Gelu {
    static constexpr bool kGateFirst = false;

    template <typename T> static KOLORS_FAST_INLINE Floats apply(Floats gate, T element) {
        return gate * gauss(gate, element).cdf;
    }

    template <typename T> static KOLORS_FAST_INLINE Activated differentiate(Floats gate, T element) {
        const Gauss normal = gauss(gate, element);
        return {gate * normal.cdf, normal.cdf + gate * normal.pdf};
    }
};

} // namespace

void geglu_forward(const GateForward &a) { gate_forward<Gelu>(a); }
void geglu_backward(const GateBackward &a) { gate_backward<Gelu>(a); }

} // namespace KOLORS_FAST_ISA
} // namespace kolors_fast
