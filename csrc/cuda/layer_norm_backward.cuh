// Backward of the LayerNorm family. With g = grad_out, rhat = (r - mean) * rstd and factor = 1 + scale:
//   dr = rstd * (g * factor - rhat * m2 - m1) + grad_r,   m1, m2 = mean of g * factor and of g * factor * rhat
//   grad_x = dr, grad_y = gate * dr;  sums over rows: grad_scale of g * rhat, grad_shift of g, grad_gate of dr * y
//
// A row belongs to a block, a thread to 8 columns, over all rows of the block's chunk: so the two or three sums of its
// columns are 24 registers, where a warp that held whole rows would need 144 for 1536 columns, and everything is read
// once. The price is one barrier a step, for m1 and m2. 64 bytes in flight per thread, and 768 threads on an SM, are
// 48 KB. The chunks' sums are added by a second kernel in a fixed order; there are no atomics.
#pragma once

#include "cuda/layer_norm.cuh"

namespace kolors_fast {

constexpr int kNormTotalColumns = kWarp;
constexpr int kNormTotalLanes = 16; // chunks that a block adds at once
// rows that a backward block reads at once: 64 bytes in flight per thread of 16-bit data, twice that of fp32
template <int V, bool kResidual> constexpr int kNormStepRows = kResidual || V == 1 ? 1 : 2;
constexpr int kNormWidestStep = kNormThreadColumns * kNormBackwardThreads; // columns

struct LayerNormBackwardLaunch {
    LayerNormBackward call;
    LayerNormPlan plan;
    float *sums; // [scale shift gate, batch, chunks, d]

    __host__ __device__ bool wants_rows() const { return call.grad_x || call.grad_y || call.grad_gate; }
    bool wants_sums() const { return call.grad_scale || call.grad_shift || call.grad_gate; }
};

// The rows of a block, and its place among the partial sums.
struct NormChunk {
    int64_t sample, begin, end, plane;
    float *sums;

    __device__ __forceinline__ NormChunk(const LayerNormBackwardLaunch &a) {
        const LayerNormShape &s = a.call.shape;
        const unsigned chunks = static_cast<unsigned>(a.plan.chunks);
        sample = blockIdx.x / chunks;
        const int64_t first = blockIdx.x % chunks * a.plan.rows;
        begin = sample * s.rows + first;
        end = sample * s.rows + min(first + a.plan.rows, s.rows);
        plane = s.batch * a.plan.chunks * s.d;
        sums = a.sums + blockIdx.x * s.d;
    }
};

// The sums over the block of N values each, in every thread. Two buffers [warps][N] in turn spare the second barrier.
template <int N> __device__ __forceinline__ void block_sums(float (&values)[N], float *buffer) {
    const int warps = blockDim.x / kWarp;
#pragma unroll
    for (int n = 0; n < N; ++n) {
        values[n] = warp_sum(values[n]);
        if (threadIdx.x % kWarp == 0)
            buffer[threadIdx.x / kWarp * N + n] = values[n];
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < N; ++n)
        values[n] = 0.0f;
    for (int warp = 0; warp < warps; ++warp)
#pragma unroll
        for (int n = 0; n < N; ++n)
            values[n] += buffer[warp * N + n];
}

// Fused with the product m1 would not cancel to zero in a row of one element, so it comes last.
__device__ __forceinline__ float row_gradient(float grad, float rhat, float m1, float m2, float rstd) {
    return (grad - rhat * m2 - m1) * rstd;
}

// The first column of pack p of a thread: its packs of V columns are `blockDim.x` packs apart.
template <int V> __device__ __forceinline__ int thread_column(int p) { return (p * blockDim.x + threadIdx.x) * V; }

// What is constant along a thread's columns, out of its registers: shared memory [8 / 4][threads][4], of which each
// thread reads only its own.
struct ThreadTerms {
    float *words;

    static __device__ __forceinline__ int floats() { return kNormThreadColumns * blockDim.x; }

    __device__ __forceinline__ float *at(int e) const { return words + (e / 4 * blockDim.x + threadIdx.x) * 4 + e % 4; }

    // `added` plus the parameters of this thread's columns
    template <int V, typename P> __device__ __forceinline__ void fill(const P *parameters, float added, int d) const {
        ParameterPack<P, V> packs[kNormThreadColumns / V];
#pragma unroll
        for (int p = 0; p < kNormThreadColumns / V; ++p)
            if (thread_column<V>(p) < d)
                packs[p].read(parameters + thread_column<V>(p));
#pragma unroll
        for (int e = 0; e < kNormThreadColumns; ++e)
            *at(e) = added + packs[e / V].get(e % V);
    }

    // elements [first, first + V) of the eight
    template <int V> __device__ __forceinline__ void read(int first, float (&v)[V]) const {
        ParameterPack<float, V> pack;
#pragma unroll
        for (int j = 0; j < V; j += pack.kWord)
            pack.words[j / pack.kWord] = load<float, pack.kWord>(at(first + j));
#pragma unroll
        for (int j = 0; j < V; ++j)
            v[j] = pack.get(j);
    }
};

// One row's elements in a thread's columns.
template <typename T, int V> struct ThreadPacks {
    static constexpr int kPacks = kNormThreadColumns / V;
    Pack<T, V> packs[kPacks] = {};

    __device__ __forceinline__ void read(const void *values, int64_t row, int d) {
#pragma unroll
        for (int p = 0; p < kPacks; ++p)
            if (thread_column<V>(p) < d)
                packs[p] = load<T, V>(static_cast<const T *>(values) + row * d + thread_column<V>(p));
    }
};

// The sums of a thread's columns over the rows of a chunk.
template <bool kResidual> struct ColumnSums {
    float scale[kNormThreadColumns] = {}, shift[kNormThreadColumns] = {}, gate[kNormThreadColumns] = {};

    template <int V>
    __device__ __forceinline__ void leave(const LayerNormBackwardLaunch &a, const NormChunk &chunk) const {
        if (a.call.grad_scale)
            leave_one<V>(scale, chunk.sums, a.call.shape.d);
        if (a.call.grad_shift)
            leave_one<V>(shift, chunk.sums + chunk.plane, a.call.shape.d);
        if (kResidual && a.call.grad_gate)
            leave_one<V>(gate, chunk.sums + 2 * chunk.plane, a.call.shape.d);
    }

    template <int V>
    static __device__ __forceinline__ void leave_one(const float (&sums)[kNormThreadColumns], float *to, int64_t d) {
        constexpr int kWord = V == 1 ? 1 : 4;
#pragma unroll
        for (int e = 0; e < kNormThreadColumns; e += kWord) {
            const int column = thread_column<V>(e / V) + e % V;
            float word[kWord];
#pragma unroll
            for (int i = 0; i < kWord; ++i)
                word[i] = sums[e + i];
            if (column < d)
                store<float, kWord>(to + column, word);
        }
    }
};

// A thread's part of U rows, which are read at once. Columns past the end and rows past the chunk's hold zeros, which
// add nothing to a sum.
template <typename T, int V, int U, bool kResidual> struct RowStep {
    using Packs = ThreadPacks<T, V>;
    const LayerNormBackward &a;
    int64_t row;
    int rows; // at most U
    Packs g[U], r[U], y[U], grad_r[U];
    float mean[U] = {}, rstd[U] = {};

    __device__ __forceinline__ RowStep(const LayerNormBackward &a, int64_t row, int64_t end)
        : a(a), row(row), rows(static_cast<int>(min(end - row, int64_t{U}))) {
        const int d = static_cast<int>(a.shape.d);
#pragma unroll
        for (int u = 0; u < U; ++u) {
            if (u < rows) {
                g[u].read(a.grad_out, row + u, d);
                r[u].read(a.r, row + u, d);
                mean[u] = a.statistics[row + u];
                rstd[u] = a.statistics[a.shape.batch * a.shape.rows + row + u];
                if (kResidual && a.grad_r)
                    grad_r[u].read(a.grad_r, row + u, d);
                if (kResidual && a.grad_gate)
                    y[u].read(a.y, row + u, d);
            }
        }
    }

    __device__ __forceinline__ float rhat(int u, int p, int j) const {
        return (r[u].packs[p].get(j) - mean[u]) * rstd[u];
    }

    // this thread's share of the sums over each row, and the rows' share of those over its columns
    __device__ __forceinline__ void add(const ThreadTerms &factors, ColumnSums<kResidual> &sums,
                                        float (&means)[2 * U]) const {
#pragma unroll
        for (int p = 0; p < Packs::kPacks; ++p) {
            float factor[V];
            factors.read(p * V, factor);
#pragma unroll
            for (int u = 0; u < U; ++u) {
#pragma unroll
                for (int j = 0; j < V; ++j) {
                    const float grad = g[u].packs[p].get(j);
                    sums.scale[p * V + j] += grad * rhat(u, p, j);
                    sums.shift[p * V + j] += grad;
                    means[2 * u] += grad * factor[j];
                    means[2 * u + 1] += grad * factor[j] * rhat(u, p, j);
                }
            }
        }
    }

    __device__ __forceinline__ void finish(const ThreadTerms &factors, const ThreadTerms &gates,
                                           const float (&means)[2 * U], ColumnSums<kResidual> &sums) const {
#pragma unroll
        for (int p = 0; p < Packs::kPacks; ++p) {
            if (thread_column<V>(p) >= a.shape.d)
                continue;
            float factor[V];
            factors.read(p * V, factor);
#pragma unroll
            for (int u = 0; u < U; ++u) {
                if (u >= rows)
                    continue;
                const int64_t at = (row + u) * a.shape.d + thread_column<V>(p);
                float v[V];
#pragma unroll
                for (int j = 0; j < V; ++j) {
                    const float grad = g[u].packs[p].get(j) * factor[j];
                    v[j] = row_gradient(grad, rhat(u, p, j), means[2 * u], means[2 * u + 1], rstd[u]);
                    if (kResidual) {
                        v[j] += grad_r[u].packs[p].get(j);
                        sums.gate[p * V + j] += v[j] * y[u].packs[p].get(j);
                    }
                }
                if (a.grad_x)
                    store<T, V>(static_cast<T *>(a.grad_x) + at, v);
                if (kResidual && a.grad_y) {
                    float gate[V];
                    gates.read(p * V, gate);
#pragma unroll
                    for (int j = 0; j < V; ++j)
                        v[j] *= gate[j];
                    store<T, V>(static_cast<T *>(a.grad_y) + at, v);
                }
            }
        }
    }
};

// Single elements have eight predicates and addresses for one: 128 registers instead of 80.
template <typename T, int V, bool kResidual>
__global__ void __launch_bounds__(V == 1 ? 512 : kNormBackwardThreads, V == 1 ? 1 : kNormBackwardResidency)
    layer_norm_grad_rows(const LayerNormBackwardLaunch a) {
    KF_SHARED(float, shared); // [1 or 2][8][threads] factor, gate; [2][warps][2 U]
    constexpr int U = kNormStepRows<V, kResidual>;
    const LayerNormBackward &call = a.call;
    const NormChunk chunk(a);
    const ThreadTerms factors{shared};
    const ThreadTerms gates{shared + factors.floats()};
    for_parameters<T>(call.shape.parameter_dtype, [&](auto element) {
        using P = decltype(element);
        const int d = static_cast<int>(call.shape.d);
        factors.fill<V>(static_cast<const P *>(call.scale) + chunk.sample * call.scale_stride, 1.0f, d);
        if (kResidual && call.grad_y)
            gates.fill<V>(static_cast<const P *>(call.gate) + chunk.sample * call.gate_stride, 0.0f, d);
    });

    float *const buffer = shared + (kResidual ? 2 : 1) * factors.floats();
    const float inverse = 1.0f / static_cast<float>(call.shape.d);
    int offset = 0;
    ColumnSums<kResidual> sums;
    for (int64_t row = chunk.begin; row < chunk.end; row += U) {
        const RowStep<T, V, U, kResidual> step(call, row, chunk.end);
        float means[2 * U] = {}; // m1, m2 of each row
        step.add(factors, sums, means);
        if (!a.wants_rows())
            continue;
        block_sums(means, buffer + offset);
        offset = offset ? 0 : blockDim.x / kWarp * 2 * U;
#pragma unroll
        for (int n = 0; n < 2 * U; ++n)
            means[n] *= inverse;
        step.finish(factors, gates, means, sums);
    }
    sums.template leave<V>(a, chunk);
}

// Rows of more than 3072 columns: each is read twice, and the sums lie in the workspace, where only one thread ever
// touches those of a column.
template <typename T, int V, bool kResidual>
__global__ void __launch_bounds__(kNormBackwardThreads, kNormBackwardResidency)
    layer_norm_grad_wide_rows(const LayerNormBackwardLaunch a) {
    KF_SHARED(float, buffer); // [2][warps][2]
    const LayerNormBackward &call = a.call;
    const int d = static_cast<int>(call.shape.d);
    const int first = threadIdx.x * V;
    const int stride = blockDim.x * V;
    const NormChunk chunk(a);
    const auto scale = [&](int column) {
        return load_any(call.scale, chunk.sample * call.scale_stride + column, call.shape.parameter_dtype, 0.0f);
    };
    const auto gate = [&](int column) {
        return load_any(call.gate, chunk.sample * call.gate_stride + column, call.shape.parameter_dtype, 1.0f);
    };
    const auto add = [&](int sum, int64_t row, int column, float value) {
        float *const total = chunk.sums + sum * chunk.plane + column;
        *total = row == chunk.begin ? value : *total + value;
    };
    for (int64_t row = chunk.begin; row < chunk.end; ++row) {
        const float mean = call.statistics[row];
        const float rstd = call.statistics[call.shape.batch * call.shape.rows + row];
        const int64_t start = row * call.shape.d;
        float means[2] = {};
        for (int column = first; column < d; column += stride) {
            const Pack<T, V> g = load<T, V>(static_cast<const T *>(call.grad_out) + start + column);
            const Pack<T, V> r = load<T, V>(static_cast<const T *>(call.r) + start + column);
#pragma unroll
            for (int j = 0; j < V; ++j) {
                const float rhat = (r.get(j) - mean) * rstd;
                const float grad = g.get(j) * (1.0f + scale(column + j));
                means[0] += grad;
                means[1] += grad * rhat;
                if (call.grad_scale)
                    add(0, row, column + j, g.get(j) * rhat);
                if (call.grad_shift)
                    add(1, row, column + j, g.get(j));
            }
        }
        if (!a.wants_rows())
            continue;
        block_sums(means, buffer + (row - chunk.begin) % 2 * (blockDim.x / kWarp * 2));
        const float m1 = means[0] / static_cast<float>(d);
        const float m2 = means[1] / static_cast<float>(d);
        for (int column = first; column < d; column += stride) {
            const Pack<T, V> g = load<T, V>(static_cast<const T *>(call.grad_out) + start + column);
            const Pack<T, V> r = load<T, V>(static_cast<const T *>(call.r) + start + column);
            float v[V];
            Pack<T, V> grad_r = {};
            if (kResidual && call.grad_r)
                grad_r = load<T, V>(static_cast<const T *>(call.grad_r) + start + column);
#pragma unroll
            for (int j = 0; j < V; ++j) {
                const float rhat = (r.get(j) - mean) * rstd;
                v[j] = row_gradient(g.get(j) * (1.0f + scale(column + j)), rhat, m1, m2, rstd) + grad_r.get(j);
            }
            if (call.grad_x)
                store<T, V>(static_cast<T *>(call.grad_x) + start + column, v);
            if (kResidual && call.grad_gate) {
                const Pack<T, V> y = load<T, V>(static_cast<const T *>(call.y) + start + column);
#pragma unroll
                for (int j = 0; j < V; ++j)
                    add(2, row, column + j, v[j] * y.get(j));
            }
            if (kResidual && call.grad_y) {
#pragma unroll
                for (int j = 0; j < V; ++j)
                    v[j] *= gate(column + j);
                store<T, V>(static_cast<T *>(call.grad_y) + start + column, v);
            }
        }
    }
}

// A block adds the chunks' sums of 32 columns of one sample: lanes of chunks first, then the lanes in order.
__global__ void __launch_bounds__(kNormTotalColumns *kNormTotalLanes)
    layer_norm_total(const LayerNormBackwardLaunch a) {
    KF_SHARED(float, shared); // [lanes][columns]
    const int64_t d = a.call.shape.d;
    const unsigned blocks = static_cast<unsigned>((d + kNormTotalColumns - 1) / kNormTotalColumns);
    const unsigned samples = static_cast<unsigned>(a.call.shape.batch);
    const int64_t row = blockIdx.x / blocks; // of [sums, batch]
    const unsigned sum = static_cast<unsigned>(row) / samples;
    float *const target = sum == 0 ? a.call.grad_scale : sum == 1 ? a.call.grad_shift : a.call.grad_gate;
    if (!target)
        return;
    const int64_t column = int64_t{blockIdx.x % blocks} * kNormTotalColumns + threadIdx.x % kNormTotalColumns;
    const int64_t lane = threadIdx.x / kNormTotalColumns;
    float total = 0.0f;
    if (column < d) {
        const float *const from = a.sums + row * a.plan.chunks * d + column;
#pragma unroll 4
        for (int64_t chunk = lane; chunk < a.plan.chunks; chunk += kNormTotalLanes)
            total += from[chunk * d];
    }
    shared[threadIdx.x] = total;
    __syncthreads();
    if (lane != 0 || column >= d)
        return;
    for (int i = 1; i < kNormTotalLanes; ++i)
        total += shared[i * kNormTotalColumns + threadIdx.x];
    target[row % samples * d + column] = total;
}

// ---- launch ----

template <typename T, int V, bool kResidual>
inline cudaError_t launch_layer_norm_backward(const LayerNormBackwardLaunch &a, cudaStream_t stream) {
    const LayerNormShape &s = a.call.shape;
    const bool held = s.d <= kNormWidestStep;
    auto rows = held ? layer_norm_grad_rows<T, V, kResidual> : layer_norm_grad_wide_rows<T, V, kResidual>;
    const int terms = held ? (kResidual ? 2 : 1) * kNormThreadColumns * a.plan.threads : 0;
    const int buffers = 2 * (a.plan.threads / kWarp) * 2 * (held ? kNormStepRows<V, kResidual> : 1);
    const dim3 grid(static_cast<unsigned>(a.plan.blocks(s)));
    KF_LAUNCH(rows, grid, dim3(a.plan.threads), (terms + buffers) * sizeof(float), stream, a);
    if (a.wants_sums()) {
        const dim3 totals(static_cast<unsigned>((kResidual ? 3 : 2) * s.batch * ceil_div(s.d, kNormTotalColumns)));
        constexpr int kThreads = kNormTotalColumns * kNormTotalLanes;
        KF_LAUNCH(layer_norm_total, totals, dim3(kThreads), kThreads * sizeof(float), stream, a);
    }
    return cudaGetLastError();
}

// The workspace has layer_norm_workspace(...) bytes and may hold anything.
template <bool kResidual>
inline cudaError_t layer_norm_backward(const LayerNormBackward &a, void *workspace, cudaStream_t stream) {
    const LayerNormShape &s = a.shape;
    if (!valid_shape(s) || (a.grad_y && !a.gate) || (a.grad_gate && !a.y))
        return cudaErrorInvalidValue;
    if (s.batch == 0 || s.d == 0)
        return cudaSuccess;
    if (s.rows == 0) {
        for (float *sum : {a.grad_scale, a.grad_shift, a.grad_gate})
            if (sum)
                if (const cudaError_t error = cudaMemsetAsync(sum, 0, s.batch * s.d * sizeof(float), stream);
                    error != cudaSuccess)
                    return error;
        return cudaSuccess;
    }
    int processors = 0;
    if (const cudaError_t error = multiprocessors(&processors); error != cudaSuccess)
        return error;
    const LayerNormBackwardLaunch launch{a, layer_norm_plan(s, processors), static_cast<float *>(workspace)};
    if (launch.plan.chunks > INT32_MAX / s.batch || 3 * ceil_div(s.d, kNormTotalColumns) > INT32_MAX / s.batch)
        return cudaErrorInvalidValue;
    const bool aligned = aligned16(a.grad_r, a.grad_out, a.r, a.y, a.gate, a.scale, a.grad_x, a.grad_y);
    return dispatch(s.dtype, vector_width(s, aligned, a.gate_stride, a.scale_stride), [&](auto element, auto width) {
        return launch_layer_norm_backward<decltype(element), decltype(width)::value, kResidual>(launch, stream);
    });
}

// Bytes of workspace for a backward pass on the current device (on a large one where there is none).
inline int64_t layer_norm_workspace(const LayerNormShape &s, int sums) {
    int processors = 0;
    if (multiprocessors(&processors) != cudaSuccess)
        processors = kNormLargeDevice;
    return layer_norm_workspace(s, sums, processors);
}

} // namespace kolors_fast
