// out = add + (x / scale, and 0 where that is not finite): fp32, rounded once. The scale is read from device memory.
#pragma once

#include "common/arguments.h"
#include "cuda/mixed.cuh"

namespace kolors_fast {

constexpr int kUnscaleThreads = 256;

template <typename From, typename To, int V> __global__ void __launch_bounds__(kUnscaleThreads)
    unscale_and_filter_kernel(const UnscaleAndFilter a) {
    const int64_t at = (static_cast<int64_t>(blockIdx.x) * kUnscaleThreads + threadIdx.x) * V;
    if (at >= a.numel)
        return;
    const From *const x = static_cast<const From *>(a.x) + at;
    To *const out = static_cast<To *>(a.out) + at;
    const float scale = *a.scale;
    for_pack<V>(a.numel - at, [&](int64_t i, auto width) {
        constexpr int W = decltype(width)::value;
        float v[W];
        float add[W] = {};
        load_floats(x + i, v);
        if (a.add && a.add_dtype == DType::float32)
            load_floats(static_cast<const float *>(a.add) + at + i, add);
        else if (a.add)
            load_floats(static_cast<const From *>(a.add) + at + i, add);
#pragma unroll
        for (int j = 0; j < W; ++j)
            v[j] = finite_or_zero(v[j] / scale) + add[j];
        store_floats(out + i, v);
    });
}

// out may be x or add itself (each thread reads what it needs before it writes), but may not overlap one at another
// offset.
inline cudaError_t unscale_and_filter(const void *x, const float *scale, const void *add, void *out, int64_t numel,
                                      int dtype, int add_dtype, int out_dtype, cudaStream_t stream) {
    if (numel < 0 || !is_dtype(dtype) || !is_dtype(out_dtype) || (add_dtype != 0 && add_dtype != dtype))
        return cudaErrorInvalidValue;
    if (numel == 0)
        return cudaSuccess;
    const UnscaleAndFilter a{x,
                             scale,
                             add,
                             out,
                             numel,
                             static_cast<DType>(dtype),
                             static_cast<DType>(add_dtype),
                             static_cast<DType>(out_dtype)};
    return dispatch_pair(a.dtype, a.out_dtype, aligned16(x, add, out), [&](auto from, auto to, auto width) {
        constexpr int V = decltype(width)::value;
        auto kernel = unscale_and_filter_kernel<decltype(from), decltype(to), V>;
        unsigned blocks;
        if (!count_blocks(numel, kUnscaleThreads * V, &blocks))
            return cudaErrorInvalidValue;
        KF_LAUNCH(kernel, dim3(blocks), dim3(kUnscaleThreads), 0, stream, a);
        return cudaGetLastError();
    });
}

} // namespace kolors_fast
