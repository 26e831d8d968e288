// Elementwise kernels that read one dtype and write another.
#pragma once

#include "cuda/common.cuh"

#include <cfloat>

namespace kolors_fast {

// V consecutive elements as fp32, in 16-byte words where that many fit
template <typename T, int V> __device__ __forceinline__ void load_floats(const T *address, float (&v)[V]) {
    constexpr int W = V == 1 ? 1 : 16 / sizeof(T);
#pragma unroll
    for (int i = 0; i < V; i += W) {
        const Pack<T, W> pack = load<T, W>(address + i);
#pragma unroll
        for (int j = 0; j < W; ++j)
            v[i + j] = pack.get(j);
    }
}

template <typename T, int V> __device__ __forceinline__ void store_floats(T *address, const float (&v)[V]) {
    constexpr int W = V == 1 ? 1 : 16 / sizeof(T);
#pragma unroll
    for (int i = 0; i < V; i += W) {
        float word[W];
#pragma unroll
        for (int j = 0; j < W; ++j)
            word[j] = v[i + j];
        store<T, W>(address + i, word);
    }
}

// body(offset, width) for the next V elements at once, or for each of the `left` that there are at the end of a tensor
template <int V, typename Body> __device__ __forceinline__ void for_pack(int64_t left, Body body) {
    if (left >= V) {
        body(int64_t{0}, Width<V>{});
        return;
    }
#pragma unroll 1
    for (int64_t i = 0; i < left; ++i)
        body(i, Width<1>{});
}

__device__ __forceinline__ float finite_or_zero(float value) { return fabsf(value) <= FLT_MAX ? value : 0.0f; }

// launch(from, to, width) with the types of two dtypes, and as many elements as fill a 16-byte word of each; or 1
template <typename Launch> inline cudaError_t dispatch_pair(DType from, DType to, bool aligned, Launch launch) {
    return dispatch(from, 1, [&](auto x, auto) {
        return dispatch(to, 1, [&](auto y, auto) {
            constexpr int wide = sizeof(x) == 4 && sizeof(y) == 4 ? 4 : 8;
            return aligned ? launch(x, y, Width<wide>{}) : launch(x, y, Width<1>{});
        });
    });
}

// false where a grid cannot be that large
inline bool count_blocks(int64_t numel, int64_t per_block, unsigned *blocks) {
    const int64_t count = (numel + per_block - 1) / per_block;
    *blocks = static_cast<unsigned>(count);
    return count <= INT32_MAX;
}

} // namespace kolors_fast
