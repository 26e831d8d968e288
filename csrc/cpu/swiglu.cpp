// y = gate * sigmoid(gate) * value, h = [gate, value]
#include "gate.h"
#include "isa.h"

namespace kolors_fast {
namespace KOLORS_FAST_ISA {
namespace {

struct Silu {
    static constexpr bool kGateFirst = true;

    template <typename T> static KOLORS_FAST_INLINE Floats apply(Floats gate, T) {
        return gate * gate_sigmoid<T>(gate);
    }

    template <typename T> static KOLORS_FAST_INLINE Activated differentiate(Floats gate, T) {
        const Floats s = gate_sigmoid<T>(gate), value = gate * s;
        return {value, s + value * (1.0f - s)};
    }

    // zero where the product with a gate far out, which sigmoid cuts off, would grow again; at -Inf it is NaN, as
    // defined
    template <typename T> static KOLORS_FAST_INLINE Floats gate_sigmoid(Floats gate) {
        return gate < -kSigmoidRange ? Floats{} : sigmoid<T>(gate);
    }
};

} // namespace

void swiglu_forward(const GateForward &a) { gate_forward<Silu>(a); }
void swiglu_backward(const GateBackward &a) { gate_backward<Silu>(a); }

} // namespace KOLORS_FAST_ISA
} // namespace kolors_fast
