// out = LayerNorm(x) * (1 + scale) + shift
#include "isa.h"
#include "layer_norm.h"

namespace kolors_fast {
namespace KOLORS_FAST_ISA {

void ada_layer_norm_forward(const LayerNormForward &a) { layer_norm_forward(a, 1.0f); }

void ada_layer_norm_backward(const LayerNormBackward &a) { layer_norm_backward(a, 1.0f); }

} // namespace KOLORS_FAST_ISA
} // namespace kolors_fast
