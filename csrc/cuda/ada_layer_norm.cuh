// ada_layer_norm: out = LayerNorm(x) * (1 + scale) + shift, on the row kernels of the LayerNorm family.
#pragma once

#include "cuda/layer_norm.cuh"
#include "cuda/layer_norm_backward.cuh"

namespace kolors_fast {

inline cudaError_t ada_layer_norm_forward(const void *x, const void *scale, const void *shift, void *out,
                                          float *statistics, int64_t batch, int64_t rows, int64_t d,
                                          int64_t scale_stride, int64_t shift_stride, double eps, int dtype,
                                          int parameter_dtype, cudaStream_t stream) {
    const LayerNormShape shape{batch, rows, d, static_cast<DType>(dtype), static_cast<DType>(parameter_dtype)};
    const LayerNormForward call{shape,        x,       nullptr, nullptr,    scale, shift, 0, scale_stride,
                                shift_stride, nullptr, out,     statistics, eps};
    return layer_norm_forward<false>(call, stream);
}

// Bytes of workspace that the backward pass needs on the current device; its contents do not matter.
inline int64_t ada_layer_norm_workspace(int64_t batch, int64_t rows, int64_t d) {
    return layer_norm_workspace({batch, rows, d, DType::float32, DType::float32}, 2);
}

inline cudaError_t ada_layer_norm_backward(const void *grad_out, const void *x, const void *scale,
                                           const float *statistics, void *grad_x, float *grad_scale, float *grad_shift,
                                           void *workspace, int64_t batch, int64_t rows, int64_t d,
                                           int64_t scale_stride, int dtype, int parameter_dtype, cudaStream_t stream) {
    const LayerNormShape shape{batch, rows, d, static_cast<DType>(dtype), static_cast<DType>(parameter_dtype)};
    const LayerNormBackward call{shape,        nullptr,    grad_out, x,       nullptr, nullptr,    scale,     0,
                                 scale_stride, statistics, grad_x,   nullptr, nullptr, grad_scale, grad_shift};
    return layer_norm_backward<false>(call, workspace, stream);
}

} // namespace kolors_fast
