// out = x * scale, and 0 where that is not finite: fp32, rounded once. The scale is read from device memory.
#pragma once

#include "common/arguments.h"
#include "cuda/mixed.cuh"

namespace kolors_fast {

constexpr int kScaleThreads = 256;

template <typename From, typename To, int V> __global__ void __launch_bounds__(kScaleThreads)
    scale_and_filter_kernel(const ScaleAndFilter a) {
    const int64_t at = (static_cast<int64_t>(blockIdx.x) * kScaleThreads + threadIdx.x) * V;
    if (at >= a.numel)
        return;
    const From *const x = static_cast<const From *>(a.x) + at;
    To *const out = static_cast<To *>(a.out) + at;
    const float scale = *a.scale;
    for_pack<V>(a.numel - at, [&](int64_t i, auto width) {
        constexpr int W = decltype(width)::value;
        float v[W];
        load_floats(x + i, v);
#pragma unroll
        for (int j = 0; j < W; ++j)
            v[j] = finite_or_zero(v[j] * scale);
        store_floats(out + i, v);
    });
}

inline cudaError_t scale_and_filter(const void *x, const float *scale, void *out, int64_t numel, int dtype,
                                    int out_dtype, cudaStream_t stream) {
    if (numel < 0 || !is_dtype(dtype) || !is_dtype(out_dtype))
        return cudaErrorInvalidValue;
    if (numel == 0)
        return cudaSuccess;
    const ScaleAndFilter a{x, scale, out, numel, static_cast<DType>(dtype), static_cast<DType>(out_dtype)};
    return dispatch_pair(a.dtype, a.out_dtype, aligned16(x, out), [&](auto from, auto to, auto width) {
        constexpr int V = decltype(width)::value;
        auto kernel = scale_and_filter_kernel<decltype(from), decltype(to), V>;
        unsigned blocks;
        if (!count_blocks(numel, kScaleThreads * V, &blocks))
            return cudaErrorInvalidValue;
        KF_LAUNCH(kernel, dim3(blocks), dim3(kScaleThreads), 0, stream, a);
        return cudaGetLastError();
    });
}

} // namespace kolors_fast
