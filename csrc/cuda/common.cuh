// What every CUDA op needs: the launch macro, 16-byte packs, conversions and warp sums.
//
// The same sources are read by nvcc and, in the tests, by g++ with the SIMT shim of tests/simt, which
// executes grids, blocks, warps, shuffles and barriers on the CPU.
#pragma once

#include "common/dtype.h"

#include <cstddef>
#include <cstdint>
#include <type_traits>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define KF_LAUNCH(kernel, grid, block, smem, stream, ...) kernel<<<(grid), (block), (smem), (stream)>>>(__VA_ARGS__)
#define KF_SHARED(type, name)                                                                                          \
    extern __shared__ float4 kf_shared_bytes[];                                                                        \
    type *const name = reinterpret_cast<type *>(kf_shared_bytes)
#define KF_CHECK_ALIGNED(pointer, bytes)
#else
#include "simt.hpp"
#endif

namespace kolors_fast {

constexpr int kWarp = 32;

// true when every address is a multiple of 16; an absent one (0) is
template <typename... Pointers> inline bool aligned16(const Pointers *...pointers) {
    return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

inline cudaError_t multiprocessors(int *count) {
    int device = 0;
    const cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess)
        return error;
    return cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
}

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ void from_float(float value, float *out) { *out = value; }
__device__ __forceinline__ void from_float(float value, __half *out) { *out = __float2half_rn(value); }
__device__ __forceinline__ void from_float(float value, __nv_bfloat16 *out) { *out = __float2bfloat16_rn(value); }

__device__ __forceinline__ uint32_t pair_bits(float low, float high, const __half *) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t *>(&pair);
}
__device__ __forceinline__ uint32_t pair_bits(float low, float high, const __nv_bfloat16 *) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t *>(&pair);
}

// V elements of T as they lie in memory: one 16-byte word, or a single element. Indices are compile-time
// constants in unrolled loops, so a pack stays in registers.
template <typename T, int V> struct Pack {
    static_assert(sizeof(T) == 2 && V == 8, "eight 16-bit elements");
    using Word = uint4;
    Word word;
    __device__ __forceinline__ float get(int j) const {
        const uint32_t bits = j < 2 ? word.x : j < 4 ? word.y : j < 6 ? word.z : word.w;
        const uint16_t element = static_cast<uint16_t>(j % 2 == 0 ? bits : bits >> 16);
        return to_float(*reinterpret_cast<const T *>(&element));
    }
    __device__ __forceinline__ void set(const float (&v)[V]) {
        const T *tag = nullptr;
        word = make_uint4(pair_bits(v[0], v[1], tag), pair_bits(v[2], v[3], tag), pair_bits(v[4], v[5], tag),
                          pair_bits(v[6], v[7], tag));
    }
};

template <> struct Pack<float, 4> {
    using Word = float4;
    Word word;
    __device__ __forceinline__ float get(int j) const {
        return j == 0 ? word.x : j == 1 ? word.y : j == 2 ? word.z : word.w;
    }
    __device__ __forceinline__ void set(const float (&v)[4]) { word = make_float4(v[0], v[1], v[2], v[3]); }
};

template <typename T> struct Pack<T, 1> {
    using Word = T;
    Word word;
    __device__ __forceinline__ float get(int) const { return to_float(word); }
    __device__ __forceinline__ void set(const float (&v)[1]) { from_float(v[0], &word); }
};

template <typename T, int V> __device__ __forceinline__ Pack<T, V> load(const T *address) {
    KF_CHECK_ALIGNED(address, sizeof(T) * V);
    Pack<T, V> pack;
    pack.word = *reinterpret_cast<const typename Pack<T, V>::Word *>(address);
    return pack;
}

template <typename T, int V> __device__ __forceinline__ void store(T *address, const float (&v)[V]) {
    KF_CHECK_ALIGNED(address, sizeof(T) * V);
    Pack<T, V> pack;
    pack.set(v);
    *reinterpret_cast<typename Pack<T, V>::Word *>(address) = pack.word;
}

// one element of a tensor whose dtype is known only at run time (weights: read once per thread)
__device__ __forceinline__ float load_any(const void *base, int64_t index, DType dtype, float absent) {
    if (!base)
        return absent;
    if (dtype == DType::float16)
        return to_float(static_cast<const __half *>(base)[index]);
    if (dtype == DType::bfloat16)
        return to_float(static_cast<const __nv_bfloat16 *>(base)[index]);
    return static_cast<const float *>(base)[index];
}

template <typename T> __device__ __forceinline__ float load_or_zero(const void *base, int64_t index) {
    return base ? to_float(static_cast<const T *>(base)[index]) : 0.0f;
}

// every lane gets the same bits: the butterfly adds the same pairs in each
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2)
        value += __shfl_xor_sync(0xffffffffu, value, offset);
    return value;
}

// 1 / (1 + exp(-z)). The short exponential errs by |z| ulp or so, far below a 16-bit store; fp32 takes the exact one.
template <typename T> __device__ __forceinline__ float sigmoid(float z) {
    const float e = sizeof(T) == 4 ? expf(-z) : __expf(-z);
    return __fdividef(1.0f, 1.0f + e);
}

template <int V> using Width = std::integral_constant<int, V>;

// launch(element, width) with the types of a dtype and of 1 or 16 bytes' worth of elements
template <typename Launch> inline cudaError_t dispatch(DType dtype, int vector, Launch launch) {
    switch (dtype) {
    case DType::float32:
        return vector == 1 ? launch(float{}, Width<1>{}) : launch(float{}, Width<4>{});
    case DType::float16:
        return vector == 1 ? launch(__half{}, Width<1>{}) : launch(__half{}, Width<8>{});
    default:
        return vector == 1 ? launch(__nv_bfloat16{}, Width<1>{}) : launch(__nv_bfloat16{}, Width<8>{});
    }
}

} // namespace kolors_fast
