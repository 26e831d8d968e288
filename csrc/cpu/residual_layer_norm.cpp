// r = x + y; out = LayerNorm(r) * weight + bias
#include "isa.h"
#include "layer_norm.h"

namespace kolors_fast {
namespace KOLORS_FAST_ISA {

void residual_layer_norm_forward(const LayerNormForward &a) { layer_norm_forward(a, 0.0f); }

void residual_layer_norm_backward(const LayerNormBackward &a) { layer_norm_backward(a, 0.0f); }

} // namespace KOLORS_FAST_ISA
} // namespace kolors_fast
