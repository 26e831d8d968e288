// RMSNorm of short rows, one per head of a token, written to their place in a joint tensor:
//   y = x * rstd * weight,   rstd = 1 / sqrt(mean(x^2) + eps)
// and back, with g = grad * weight:
//   grad_x = rstd * (g - x * rstd^2 * mean(g * x)),   grad_weight = sum over rows of grad * x * rstd.
// q, k and v of both streams are parts of one launch. A row is shared by a few neighbouring threads, each of which
// holds P 16-byte packs of it (8 threads with 1 pack, or 4 with 2, for 64 halves), so that a block has many rows in
// flight and a row's sum takes two or three shuffles. Sums of grad_weight are fp32 in a fixed order, without atomics.
#pragma once

#include "common/arguments.h"
#include "cuda/common.cuh"

#include <algorithm>

namespace kolors_fast {

constexpr int kQkNormThreads = 128;
constexpr int kQkNormHeadDim = 256;      // the longest row that 32 threads of any pack hold
constexpr int kQkNormBlocksPerSm = 8;    // of the backward pass, where each block leaves its sum over rows
constexpr int kQkNormReduceColumns = 32; // of a block that adds these sums

struct QkNormLaunch {
    QkNormPart parts[kQkNormParts];
    unsigned first_block[kQkNormParts + 1]; // the parts' blocks, numbered through
    unsigned heads, head_dim, batch;
    int lanes; // threads of a row, a power of two
    DType weight_dtype;
    float eps;
    float *sums; // backward: [blocks, head_dim]

    __host__ __device__ unsigned rows(int part) const {
        return batch * static_cast<unsigned>(parts[part].tokens) * heads;
    }
};

__device__ __forceinline__ int part_of_block(const QkNormLaunch &a) {
    int part = 0;
    while (blockIdx.x >= a.first_block[part + 1])
        ++part;
    return part;
}

// Where a row begins.
struct QkNormRow {
    unsigned sample, token, head;

    __device__ __forceinline__ QkNormRow(const QkNormLaunch &a, unsigned tokens, unsigned row)
        : sample(row / a.heads / tokens), token(row / a.heads % tokens), head(row % a.heads) {}

    template <typename T, typename Data> __device__ __forceinline__ T *in(const QkNormRows<Data> &rows) const {
        return static_cast<T *>(rows.data) + sample * rows.batch + token * rows.token + head * rows.head;
    }
};

__device__ __forceinline__ float row_sum(float value, int lanes) {
    for (int offset = lanes / 2; offset > 0; offset /= 2)
        value += __shfl_xor_sync(0xffffffffu, value, offset);
    return value;
}

// The weight of a part as fp32 in shared memory; ends with a barrier.
__device__ __forceinline__ void share_weight(const QkNormLaunch &a, const void *weight, float *shared) {
    for (unsigned i = threadIdx.x; i < a.head_dim; i += blockDim.x)
        shared[i] = load_any(weight, i, a.weight_dtype, 1.0f);
    __syncthreads();
}

template <int V> __device__ __forceinline__ void read_weight(const float *shared, float (&weight)[V]) {
    constexpr int W = V == 1 ? 1 : 4;
#pragma unroll
    for (int j = 0; j < V; j += W) {
        const Pack<float, W> pack = load<float, W>(shared + j);
#pragma unroll
        for (int i = 0; i < W; ++i)
            weight[j + i] = pack.get(i);
    }
}

// This thread's packs of a row, zeros where it has none; the first element of pack p is column(p).
template <int P, typename T, int V> struct RowPacks {
    Pack<T, V> packs[P];

    static __device__ __forceinline__ unsigned column(int p, int lanes) {
        return (threadIdx.x % lanes + p * lanes) * V;
    }

    __device__ __forceinline__ void read(const T *row, const QkNormLaunch &a, bool inside) {
#pragma unroll
        for (int p = 0; p < P; ++p) {
            packs[p] = {};
            if (inside && column(p, a.lanes) < a.head_dim)
                packs[p] = load<T, V>(row + column(p, a.lanes));
        }
    }

    __device__ __forceinline__ float squares() const {
        float sum = 0.0f;
#pragma unroll
        for (int p = 0; p < P; ++p) {
#pragma unroll
            for (int j = 0; j < V; ++j)
                sum += packs[p].get(j) * packs[p].get(j);
        }
        return sum;
    }

    __device__ __forceinline__ void copy(T *row, const QkNormLaunch &a, bool inside) const {
#pragma unroll
        for (int p = 0; p < P; ++p)
            if (inside && column(p, a.lanes) < a.head_dim)
                *reinterpret_cast<typename Pack<T, V>::Word *>(row + column(p, a.lanes)) = packs[p].word;
    }
};

__device__ __forceinline__ float rstd_of(float squares, const QkNormLaunch &a) {
    return 1.0f / sqrtf(squares * (1.0f / static_cast<float>(a.head_dim)) + a.eps);
}

template <int P, typename T, int V> __global__ void __launch_bounds__(kQkNormThreads)
    qk_norm_forward_kernel(const QkNormLaunch a) {
    KF_SHARED(float, shared); // [head_dim]
    const int part = part_of_block(a);
    const QkNormPart &call = a.parts[part];
    const unsigned rows_of_block = kQkNormThreads / a.lanes;
    const unsigned row = (blockIdx.x - a.first_block[part]) * rows_of_block + threadIdx.x / a.lanes;
    const bool inside = row < a.rows(part);
    const QkNormRow at(a, static_cast<unsigned>(call.tokens), inside ? row : 0);
    RowPacks<P, T, V> x;
    x.read(at.in<const T>(call.x), a, inside);
    T *const y = at.in<T>(call.y);
    if (!call.weight) {
        x.copy(y, a, inside);
        return; // the whole block does
    }
    share_weight(a, call.weight, shared);
    const float rstd = rstd_of(row_sum(x.squares(), a.lanes), a);
#pragma unroll
    for (int p = 0; p < P; ++p) {
        const unsigned column = x.column(p, a.lanes);
        if (inside && column < a.head_dim) {
            float weight[V], v[V];
            read_weight(shared + column, weight);
#pragma unroll
            for (int j = 0; j < V; ++j)
                v[j] = x.packs[p].get(j) * rstd * weight[j];
            store<T, V>(y + column, v);
        }
    }
}

template <int P, typename T, int V> __global__ void __launch_bounds__(kQkNormThreads)
    qk_norm_backward_kernel(const QkNormLaunch a) {
    KF_SHARED(float, shared); // [head_dim], then [rows of a block][head_dim]
    const int part = part_of_block(a);
    const QkNormPart &call = a.parts[part];
    const unsigned rows_of_block = kQkNormThreads / a.lanes, rows = a.rows(part);
    const unsigned blocks = a.first_block[part + 1] - a.first_block[part];
    share_weight(a, call.weight, shared);
    float sums[P][V] = {};
    for (unsigned first = (blockIdx.x - a.first_block[part]) * rows_of_block; first < rows;
         first += blocks * rows_of_block) {
        const unsigned row = first + threadIdx.x / a.lanes;
        const bool inside = row < rows;
        const QkNormRow at(a, static_cast<unsigned>(call.tokens), inside ? row : 0);
        RowPacks<P, T, V> x, grad;
        grad.read(at.in<const T>(call.grad), a, inside);
        T *const grad_x = call.y.data ? at.in<T>(call.y) : nullptr;
        if (!call.weight) {
            grad.copy(grad_x, a, inside);
            continue;
        }
        x.read(at.in<const T>(call.x), a, inside);
        float dot = 0.0f;
#pragma unroll
        for (int p = 0; p < P; ++p) {
            const unsigned column = x.column(p, a.lanes);
            if (column < a.head_dim) {
                float weight[V];
                read_weight(shared + column, weight);
#pragma unroll
                for (int j = 0; j < V; ++j)
                    dot += grad.packs[p].get(j) * weight[j] * x.packs[p].get(j);
            }
        }
        const float rstd = rstd_of(row_sum(x.squares(), a.lanes), a);
        const float back = row_sum(dot, a.lanes) * (1.0f / static_cast<float>(a.head_dim)) * rstd * rstd;
#pragma unroll
        for (int p = 0; p < P; ++p) {
            const unsigned column = x.column(p, a.lanes);
            if (column < a.head_dim) {
                float weight[V], v[V];
                read_weight(shared + column, weight);
#pragma unroll
                for (int j = 0; j < V; ++j) {
                    const float value = x.packs[p].get(j), g = grad.packs[p].get(j);
                    sums[p][j] += g * (value * rstd);
                    v[j] = rstd * (g * weight[j] - value * back);
                }
                if (inside && grad_x)
                    store<T, V>(grad_x + column, v);
            }
        }
    }
    if (!call.grad_weight)
        return; // the whole block does
    float *const rows_sums = shared + (a.head_dim + 3) / 4 * 4;
#pragma unroll
    for (int p = 0; p < P; ++p) {
        const unsigned column = RowPacks<P, T, V>::column(p, a.lanes);
        if (column < a.head_dim) {
#pragma unroll
            for (int j = 0; j < V; ++j)
                rows_sums[threadIdx.x / a.lanes * a.head_dim + column + j] = sums[p][j];
        }
    }
    __syncthreads();
    for (unsigned i = threadIdx.x; i < a.head_dim; i += blockDim.x) {
        float total = 0.0f;
        for (unsigned row = 0; row < rows_of_block; ++row)
            total += rows_sums[row * a.head_dim + i];
        a.sums[static_cast<size_t>(blockIdx.x) * a.head_dim + i] = total;
    }
}

// grad_weight from the sums of a part's blocks: kQkNormReduceColumns columns of one part, four threads for each
__global__ void __launch_bounds__(kQkNormThreads) qk_norm_grad_weight_kernel(const QkNormLaunch a) {
    KF_SHARED(float, shared); // [threads of a column][kQkNormReduceColumns]
    constexpr unsigned kShare = kQkNormThreads / kQkNormReduceColumns;
    const unsigned groups = (a.head_dim + kQkNormReduceColumns - 1) / kQkNormReduceColumns;
    const unsigned part = blockIdx.x / groups, lane = threadIdx.x / kQkNormReduceColumns;
    const unsigned column = blockIdx.x % groups * kQkNormReduceColumns + threadIdx.x % kQkNormReduceColumns;
    float *const grad_weight = a.parts[part].grad_weight;
    if (!grad_weight)
        return; // the whole block does
    float total = 0.0f;
    for (unsigned block = a.first_block[part] + lane; block < a.first_block[part + 1]; block += kShare)
        total += column < a.head_dim ? a.sums[static_cast<size_t>(block) * a.head_dim + column] : 0.0f;
    shared[threadIdx.x] = total;
    __syncthreads();
    if (lane == 0 && column < a.head_dim) {
        for (unsigned i = 1; i < kShare; ++i)
            total += shared[i * kQkNormReduceColumns + threadIdx.x];
        grad_weight[column] = total;
    }
}

// ---- launch ----

// How a row is shared: packs of a thread, and threads, so that as few packs as possible are empty.
struct QkNormSplit {
    int packs, lanes;
};

inline int power_of_two(int least) {
    int power = 1;
    while (power < least)
        power *= 2;
    return power;
}

// 2 packs are 32 bytes in flight per tensor; 3 leave 3 of 12 empty in a row of 9 (72 halves), where 2 leave 7 of 16.
// Single elements are the way out for odd strides.
inline QkNormSplit qk_norm_split(int head_dim, int vector) {
    const int packs = head_dim / vector;
    if (vector == 1)
        return {8, power_of_two((packs + 7) / 8)};
    const int two = power_of_two((packs + 1) / 2), three = power_of_two((packs + 2) / 3);
    return three * 3 < two * 2 ? QkNormSplit{3, three} : QkNormSplit{2, two};
}

template <typename Data> inline bool aligned_rows(const QkNormRows<Data> &rows, int64_t vector) {
    return aligned16(rows.data) && rows.batch % vector == 0 && rows.token % vector == 0 && rows.head % vector == 0;
}

// Fills in everything but the blocks; the widest access that all parts allow, in elements.
inline cudaError_t qk_norm_prepare(const QkNorm &call, QkNormLaunch *a, int *vector) {
    if (call.count < 0 || call.count > kQkNormParts || call.batch < 0 || call.heads < 0 || call.head_dim < 1 ||
        call.head_dim > kQkNormHeadDim)
        return cudaErrorInvalidValue;
    const int wide = call.dtype == DType::float32 ? 4 : 8;
    *vector = call.head_dim % wide == 0 ? wide : 1;
    a->heads = static_cast<unsigned>(call.heads);
    a->head_dim = static_cast<unsigned>(call.head_dim);
    a->batch = static_cast<unsigned>(call.batch);
    a->weight_dtype = call.weight_dtype;
    a->eps = static_cast<float>(call.eps);
    for (int p = 0; p < call.count; ++p) {
        const QkNormPart &part = a->parts[p] = call.parts[p];
        if (part.tokens < 0 || call.batch * part.tokens * call.heads > INT32_MAX)
            return cudaErrorInvalidValue;
        if (!aligned_rows(part.x, wide) || !aligned_rows(part.y, wide) || !aligned_rows(part.grad, wide))
            *vector = 1;
    }
    a->lanes = qk_norm_split(static_cast<int>(call.head_dim), *vector).lanes;
    return cudaSuccess;
}

// launch(element, width, packs) with the types of the call
template <typename Launch>
inline cudaError_t qk_norm_dispatch(DType dtype, int vector, int head_dim, const Launch &launch) {
    const int packs = qk_norm_split(head_dim, vector).packs;
    return dispatch(dtype, vector, [&](auto element, auto width) {
        if constexpr (decltype(width)::value == 1)
            return launch(element, width, Width<8>{});
        else
            return packs == 2 ? launch(element, width, Width<2>{}) : launch(element, width, Width<3>{});
    });
}

// parts lie in the host's memory
inline cudaError_t qk_norm_forward(const QkNormPart *parts, int count, int64_t batch, int64_t heads, int64_t head_dim,
                                   double eps, int dtype, int weight_dtype, cudaStream_t stream) {
    if (!is_dtype(dtype) || !is_dtype(weight_dtype))
        return cudaErrorInvalidValue;
    const QkNorm call{
        parts, count, batch, heads, head_dim, eps, static_cast<DType>(dtype), static_cast<DType>(weight_dtype)};
    QkNormLaunch a{};
    int vector = 1;
    if (const cudaError_t error = qk_norm_prepare(call, &a, &vector))
        return error;
    const unsigned rows_of_block = kQkNormThreads / a.lanes;
    for (int p = 0; p < kQkNormParts; ++p)
        a.first_block[p + 1] = a.first_block[p] + (p < count ? (a.rows(p) + rows_of_block - 1) / rows_of_block : 0);
    const unsigned blocks = a.first_block[kQkNormParts];
    if (blocks == 0)
        return cudaSuccess;
    return qk_norm_dispatch(call.dtype, vector, static_cast<int>(head_dim), [&](auto element, auto width, auto packs) {
        auto kernel = qk_norm_forward_kernel<decltype(packs)::value, decltype(element), decltype(width)::value>;
        KF_LAUNCH(kernel, dim3(blocks), dim3(kQkNormThreads), a.head_dim * sizeof(float), stream, a);
        return cudaGetLastError();
    });
}

// Blocks that a backward pass shares out to its parts by their rows; each part rounds up.
inline unsigned qk_norm_backward_blocks(int multiprocessors) {
    return static_cast<unsigned>(multiprocessors) * kQkNormBlocksPerSm;
}

// Bytes of workspace that a backward pass on the current device needs, however many rows there are.
inline int64_t qk_norm_workspace(int64_t head_dim) {
    int count = 0;
    if (multiprocessors(&count) != cudaSuccess)
        return 0;
    return static_cast<int64_t>(qk_norm_backward_blocks(count) + kQkNormParts) * head_dim * sizeof(float);
}

inline cudaError_t qk_norm_backward(const QkNormPart *parts, void *workspace, int count, int64_t batch, int64_t heads,
                                    int64_t head_dim, double eps, int dtype, int weight_dtype, cudaStream_t stream) {
    if (!is_dtype(dtype) || !is_dtype(weight_dtype))
        return cudaErrorInvalidValue;
    const QkNorm call{
        parts, count, batch, heads, head_dim, eps, static_cast<DType>(dtype), static_cast<DType>(weight_dtype)};
    QkNormLaunch a{};
    int vector = 1, processors = 0;
    if (const cudaError_t error = qk_norm_prepare(call, &a, &vector))
        return error;
    if (const cudaError_t error = multiprocessors(&processors))
        return error;
    a.sums = static_cast<float *>(workspace);
    const uint64_t rows_of_block = kQkNormThreads / a.lanes, wanted = qk_norm_backward_blocks(processors);
    uint64_t all = 0;
    for (int p = 0; p < count; ++p)
        all += a.rows(p);
    for (int p = 0; p < kQkNormParts; ++p) {
        const uint64_t rows = p < count ? a.rows(p) : 0;
        // a part without rows has a block all the same: it writes the zeros of grad_weight
        const uint64_t share =
            p < count ? std::max<uint64_t>(1, (wanted * rows + all - 1) / std::max<uint64_t>(1, all)) : 0;
        const uint64_t enough = std::max<uint64_t>(1, (rows + rows_of_block - 1) / rows_of_block);
        a.first_block[p + 1] = a.first_block[p] + static_cast<unsigned>(std::min(share, enough));
    }
    const unsigned blocks = a.first_block[kQkNormParts];
    if (blocks == 0)
        return cudaSuccess;
    const size_t smem = ((head_dim + 3) / 4 * 4 + rows_of_block * head_dim) * sizeof(float);
    const cudaError_t error =
        qk_norm_dispatch(call.dtype, vector, static_cast<int>(head_dim), [&](auto element, auto width, auto packs) {
            auto kernel = qk_norm_backward_kernel<decltype(packs)::value, decltype(element), decltype(width)::value>;
            KF_LAUNCH(kernel, dim3(blocks), dim3(kQkNormThreads), smem, stream, a);
            return cudaGetLastError();
        });
    if (error != cudaSuccess)
        return error;
    const auto groups = static_cast<unsigned>((head_dim + kQkNormReduceColumns - 1) / kQkNormReduceColumns);
    KF_LAUNCH(qk_norm_grad_weight_kernel, dim3(static_cast<unsigned>(count) * groups), dim3(kQkNormThreads),
              kQkNormThreads * sizeof(float), stream, a);
    return cudaGetLastError();
}

} // namespace kolors_fast
