// y = gate * sigmoid(gate) * value, h = [gate, value]
#include "gate.h"
#include "isa.h"

namespace kolors_fast {
namespace KOLORS_FAST_ISA {
namespace {

struct Silu {
    static constexpr bool kGateFirst = true;

    template <typename T> static KOLORS_FAST_INLINE Floats apply(Floats gate, T) { return gate * sigmoid(gate); }

    template <typename T> static KOLORS_FAST_INLINE Activated differentiate(Floats gate, T) {
        const Floats s = sigmoid(gate), value = gate * s;
        return {value, s + value * (1.0f - s)};
    }
};

} // namespace

void swiglu_forward(const GateForward &a) { gate_forward<Silu>(a); }
void swiglu_backward(const GateBackward &a) { gate_backward<Silu>(a); }

} // namespace KOLORS_FAST_ISA
} // namespace kolors_fast
