// gated_residual_ada_layer_norm: r = x + gate * y; out = LayerNorm(r) * (1 + scale) + shift, on the row kernels of the
// LayerNorm family.
#pragma once

#include "cuda/layer_norm.cuh"
#include "cuda/layer_norm_backward.cuh"

namespace kolors_fast {

inline cudaError_t gated_residual_ada_layer_norm_forward(const void *x, const void *y, const void *gate,
                                                         const void *scale, const void *shift, void *r, void *out,
                                                         float *statistics, int64_t batch, int64_t rows, int64_t d,
                                                         int64_t gate_stride, int64_t scale_stride,
                                                         int64_t shift_stride, double eps, int dtype,
                                                         int parameter_dtype, cudaStream_t stream) {
    const LayerNormShape shape{batch, rows, d, static_cast<DType>(dtype), static_cast<DType>(parameter_dtype)};
    const LayerNormForward call{shape,        x, y,   gate,       scale, shift, gate_stride, scale_stride,
                                shift_stride, r, out, statistics, eps};
    return layer_norm_forward<true>(call, stream);
}

// Bytes of workspace that the backward pass needs on the current device; its contents do not matter.
inline int64_t gated_residual_ada_layer_norm_workspace(int64_t batch, int64_t rows, int64_t d) {
    return layer_norm_workspace({batch, rows, d, DType::float32, DType::float32}, 3);
}

inline cudaError_t gated_residual_ada_layer_norm_backward(const void *grad_r, const void *grad_out, const void *r,
                                                          const void *y, const void *gate, const void *scale,
                                                          const float *statistics, void *grad_x, void *grad_y,
                                                          float *grad_gate, float *grad_scale, float *grad_shift,
                                                          void *workspace, int64_t batch, int64_t rows, int64_t d,
                                                          int64_t gate_stride, int64_t scale_stride, int dtype,
                                                          int parameter_dtype, cudaStream_t stream) {
    const LayerNormShape shape{batch, rows, d, static_cast<DType>(dtype), static_cast<DType>(parameter_dtype)};
    const LayerNormBackward call{shape,     grad_r,      grad_out,     r,          y,      gate,
                                 scale,     gate_stride, scale_stride, statistics, grad_x, grad_y,
                                 grad_gate, grad_scale,  grad_shift};
    return layer_norm_backward<true>(call, workspace, stream);
}

} // namespace kolors_fast
