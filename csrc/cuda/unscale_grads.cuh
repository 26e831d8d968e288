// grads[i] /= scales[i] in place for a list of tensors, the L2 norm of all of them, and which hold a NaN or Inf.
//
// As in apex's multi_tensor_apply, the list travels in the kernel's arguments, so that nothing is uploaded and nothing
// outlives the launch. Tensors are cut into chunks of a fixed size, one block each; a block finds its tensor by
// bisection. Each block leaves its sum of squares in the workspace, and one more block adds those up.
#pragma once

#include "common/arguments.h"
#include "cuda/mixed.cuh"

#include <cmath>

namespace kolors_fast {

constexpr int kGradsThreads = 256;
constexpr int kGradsChunk = 16384;   // elements: 64 for each thread
constexpr int kGradsBatch = 4;       // loads in flight per thread
constexpr int kGradsPerLaunch = 160; // what fits in 4 KB of arguments
constexpr int kNormThreads = 1024;

struct GradsLaunch {
    struct {
        void *data;
        int64_t numel;
        int32_t first_block;
        DType dtype;
    } tensors[kGradsPerLaunch];
    const float *scales; // of the launch's first tensor
    int64_t scale_stride;
    bool *nonfinite; // of the launch's first tensor
    float *squares;  // of the launch's first block
    int count;
};
static_assert(sizeof(GradsLaunch) <= 4096, "kernel arguments of every architecture");

// The quotients of one thread: each is added as it is and stored as it rounds.
template <typename T, int V> struct Unscale {
    float scale;
    float squares[V] = {}; // by place in a word
    bool finite = true;    // all that is stored

    __device__ __forceinline__ float operator()(float value, int j) {
        const float quotient = value / scale;
        squares[j] += quotient * quotient;
        T rounded;
        from_float(quotient, &rounded);
        const float stored = to_float(rounded);
        finite = finite && fabsf(stored) <= FLT_MAX;
        return stored;
    }
};

// The thread's sum of squares, which may overflow to Inf; NaN if it stores what is not finite. Its elements and their
// order do not depend on how they can be loaded, so neither do the bits of the sum.
template <typename T> __device__ float unscale_chunk(T *data, int count, float scale) {
    constexpr int V = 16 / sizeof(T);
    constexpr int kStep = kGradsThreads * V;
    static_assert(kGradsChunk % (kGradsBatch * kStep) == 0, "a full chunk has whole batches");
    Unscale<T, V> unscale{scale};
    const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0;
    if (aligned && count == kGradsChunk) {
#pragma unroll 1
        for (int i = threadIdx.x * V; i < kGradsChunk; i += kGradsBatch * kStep) {
            float v[kGradsBatch][V]; // all loads come before the first store
#pragma unroll
            for (int b = 0; b < kGradsBatch; ++b)
                load_floats(data + i + b * kStep, v[b]);
#pragma unroll
            for (int b = 0; b < kGradsBatch; ++b) {
#pragma unroll
                for (int j = 0; j < V; ++j)
                    v[b][j] = unscale(v[b][j], j);
                store_floats(data + i + b * kStep, v[b]);
            }
        }
    } else {
#pragma unroll 1
        for (int i = threadIdx.x * V; i < count; i += kStep) {
            const bool whole = aligned && i + V <= count;
            float v[V] = {};
            if (whole)
                load_floats(data + i, v);
#pragma unroll
            for (int j = 0; j < V; ++j) {
                if (i + j >= count)
                    continue;
                v[j] = unscale(whole ? v[j] : to_float(data[i + j]), j);
                if (!whole)
                    from_float(v[j], data + i + j);
            }
            if (whole)
                store_floats(data + i, v);
        }
    }
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < V; ++j)
        sum += unscale.squares[j];
    return unscale.finite ? sum : NAN;
}

__global__ void __launch_bounds__(kGradsThreads) unscale_grads_kernel(const GradsLaunch a) {
    KF_SHARED(float, warps);
    const int block = static_cast<int>(blockIdx.x);
    int at = 0; // becomes the last tensor that starts at this block or before
    for (int end = a.count; end - at > 1;) {
        const int middle = (at + end) / 2;
        if (a.tensors[middle].first_block <= block)
            at = middle;
        else
            end = middle;
    }
    const int64_t begin = static_cast<int64_t>(block - a.tensors[at].first_block) * kGradsChunk;
    const int64_t left = a.tensors[at].numel - begin;
    const int count = static_cast<int>(left < kGradsChunk ? left : kGradsChunk);
    const float scale = a.scales[at * a.scale_stride];
    const auto run = [&](auto element) {
        return unscale_chunk(static_cast<decltype(element) *>(a.tensors[at].data) + begin, count, scale);
    };
    const DType dtype = a.tensors[at].dtype;
    float sum = dtype == DType::float32 ? run(float{}) : dtype == DType::float16 ? run(__half{}) : run(__nv_bfloat16{});
    if (sum != sum)
        a.nonfinite[at] = true; // whoever writes, writes the same
    sum = warp_sum(sum);
    if (threadIdx.x % kWarp == 0)
        warps[threadIdx.x / kWarp] = sum;
    __syncthreads();
    if (threadIdx.x != 0)
        return;
    sum = 0.0f;
    for (int w = 0; w < kGradsThreads / kWarp; ++w)
        sum += warps[w];
    a.squares[block] = sum;
}

// One block. fp64, for a model of 10^10 parameters has 10^6 chunks.
__global__ void __launch_bounds__(kNormThreads)
    unscale_grads_norm_kernel(const float *squares, int64_t chunks, float *norm) {
    KF_SHARED(double, sums);
    double sum = 0.0;
    for (int64_t i = threadIdx.x; i < chunks; i += kNormThreads)
        sum += squares[i];
    sums[threadIdx.x] = sum;
    for (unsigned half = kNormThreads / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half)
            sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    if (threadIdx.x == 0)
        *norm = static_cast<float>(sqrt(sums[0]));
}

inline int64_t grads_chunks(int64_t numel) { return (numel + kGradsChunk - 1) / kGradsChunk; }

// Bytes of workspace: a sum for each chunk.
inline int64_t unscale_grads_workspace(const TensorEntry *table, int64_t tensors) {
    int64_t chunks = 0;
    for (int64_t t = 0; t < tensors; ++t)
        chunks += grads_chunks(table[t].numel);
    return chunks * static_cast<int64_t>(sizeof(float));
}

inline cudaError_t unscale_grads(const TensorEntry *table, const float *scales, float *norm, bool *nonfinite,
                                 void *workspace, int64_t tensors, int64_t scale_stride, cudaStream_t stream) {
    for (int64_t t = 0; t < tensors; ++t)
        if (table[t].numel < 0 || table[t].dtype < 0 || table[t].dtype > 2)
            return cudaErrorInvalidValue;
    float *const squares = static_cast<float *>(workspace);
    int64_t done = 0; // chunks
    if (tensors > 0)
        cudaMemsetAsync(nonfinite, 0, tensors, stream);
    for (int64_t begin = 0; begin < tensors; begin += kGradsPerLaunch) {
        GradsLaunch a;
        a.scales = scales + begin * scale_stride;
        a.scale_stride = scale_stride;
        a.nonfinite = nonfinite + begin;
        a.squares = squares + done;
        a.count = static_cast<int>(tensors - begin < kGradsPerLaunch ? tensors - begin : kGradsPerLaunch);
        int64_t blocks = 0;
        for (int i = 0; i < a.count; ++i) {
            const TensorEntry &tensor = table[begin + i];
            a.tensors[i] = {reinterpret_cast<void *>(tensor.address), tensor.numel, static_cast<int32_t>(blocks),
                            static_cast<DType>(tensor.dtype)};
            blocks += grads_chunks(tensor.numel);
            if (blocks > INT32_MAX)
                return cudaErrorInvalidValue;
        }
        if (blocks > 0)
            KF_LAUNCH(unscale_grads_kernel, dim3(static_cast<unsigned>(blocks)), dim3(kGradsThreads),
                      kGradsThreads / kWarp * sizeof(float), stream, a);
        done += blocks;
    }
    KF_LAUNCH(unscale_grads_norm_kernel, dim3(1), dim3(kNormThreads), kNormThreads * sizeof(double), stream, squares,
              done, norm);
    return cudaGetLastError();
}

} // namespace kolors_fast
