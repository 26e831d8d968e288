// Forward of the LayerNorm family: r = x + gate * y; out = (r - mean) * rstd * (1 + scale) + shift.
//
// A row belongs to one warp, which holds it in registers from its load to its store: memory is read once, a reduction
// is five shuffles, and no warp waits for another at a barrier. A row of 1536 halves is 6 packs a lane; the 24 warps
// that an SM has registers for have 72 KB of x in flight, where bandwidth times latency of an H100 is about 20 KB (3.35
// TB/s x 0.8 us / 132, arithmetic). The rows of scale, shift and gate are read by every warp, and after the first of an
// SM come from its L1. Rows of more than 2560 columns (1536 in fp32), and those that are not made of aligned packs, are
// read again for each of three passes.
#pragma once

#include "common/arguments.h"
#include "cuda/common.cuh"
#include "cuda/layer_norm_plan.hpp"

namespace kolors_fast {

// V neighbours of gate, scale or shift, which are in the dtype of x or in fp32
template <typename P, int V> struct ParameterPack {
    static constexpr int kWord = V == 1 ? 1 : 16 / sizeof(P);
    Pack<P, kWord> words[V / kWord] = {};

    __device__ __forceinline__ void fill(float value) {
        float v[kWord];
#pragma unroll
        for (int j = 0; j < kWord; ++j)
            v[j] = value;
#pragma unroll
        for (int i = 0; i < V / kWord; ++i)
            words[i].set(v);
    }

    __device__ __forceinline__ void read(const P *address) {
#pragma unroll
        for (int i = 0; i < V / kWord; ++i)
            words[i] = load<P, kWord>(address + i * kWord);
    }
    __device__ __forceinline__ float get(int j) const { return words[j / kWord].get(j % kWord); }
};

// body(element) with the type of the parameters, T or float
template <typename T, typename Body> __device__ __forceinline__ void for_parameters(DType dtype, Body body) {
    if (sizeof(T) < sizeof(float) && dtype == DType::float32)
        body(float{});
    else
        body(T{});
}

template <typename T, int V> __device__ __forceinline__ void store_pack(T *address, const Pack<T, V> &pack) {
    KF_CHECK_ALIGNED(address, sizeof(T) * V);
    *reinterpret_cast<typename Pack<T, V>::Word *>(address) = pack.word;
}

// x + gate * y, rounded as it is stored
template <typename T, int V, typename P>
__device__ __forceinline__ void add_residual(Pack<T, V> &x, const Pack<T, V> &y, const ParameterPack<P, V> &gate) {
    float r[V];
#pragma unroll
    for (int j = 0; j < V; ++j)
        r[j] = x.get(j) + gate.get(j) * y.get(j);
    x.set(r);
}

struct RowMoments {
    float mean, rstd;
};

template <typename T, int V, typename P>
__device__ __forceinline__ void modulate(const Pack<T, V> &r, const RowMoments &m, const ParameterPack<P, V> &scale,
                                         const ParameterPack<P, V> &shift, float (&v)[V]) {
#pragma unroll
    for (int j = 0; j < V; ++j)
        v[j] = (r.get(j) - m.mean) * m.rstd * (1.0f + scale.get(j)) + shift.get(j);
}

// Packs whose other operands are on their way together: two, or one where registers are scarce.
template <typename T, typename P> constexpr int kNormBatch = sizeof(P) > sizeof(T) ? 1 : 2;

// One lane's packs of a row of r, in registers. Those past the row's end are zeros. All pointers are to the lane's
// first column, from which `left` columns are left in the row.
template <typename T, int V, int PACKS> struct WarpRow {
    int left;
    Pack<T, V> packs[PACKS] = {};

    static __device__ __forceinline__ int offset(int p) { return p * kWarp * V; }

    __device__ __forceinline__ WarpRow(const T *x, int left) : left(left) {
#pragma unroll
        for (int p = 0; p < PACKS; ++p)
            if (offset(p) < left)
                packs[p] = load<T, V>(x + offset(p));
    }

    template <typename P> __device__ __forceinline__ void add(const T *y, const P *gate, T *r) {
        constexpr int kAhead = sizeof(T) == 2 && PACKS <= 6 ? PACKS : 2; // packs of y in flight
        constexpr int kBatch = kNormBatch<T, P>;
#pragma unroll
        for (int ahead = 0; ahead < PACKS; ahead += kAhead) {
            Pack<T, V> added[kAhead] = {};
#pragma unroll
            for (int p = 0; p < kAhead && ahead + p < PACKS; ++p)
                if (offset(ahead + p) < left)
                    added[p] = load<T, V>(y + offset(ahead + p));
#pragma unroll
            for (int first = 0; first < kAhead; first += kBatch) {
                ParameterPack<P, V> gates[kBatch];
#pragma unroll
                for (int p = first; p < first + kBatch && p < kAhead && ahead + p < PACKS; ++p) {
                    gates[p - first].fill(1.0f);
                    if (gate && offset(ahead + p) < left)
                        gates[p - first].read(gate + offset(ahead + p));
                }
#pragma unroll
                for (int p = first; p < first + kBatch && p < kAhead && ahead + p < PACKS; ++p) {
                    add_residual(packs[ahead + p], added[p], gates[p - first]);
                    if (offset(ahead + p) < left)
                        store_pack(r + offset(ahead + p), packs[ahead + p]);
                }
            }
        }
    }

    // body(pack, whether the row has its columns)
    template <typename Body> __device__ __forceinline__ void each(Body body) const {
#pragma unroll
        for (int p = 0; p < PACKS; ++p)
            body(packs[p], offset(p) < left);
    }

    template <typename P>
    __device__ __forceinline__ void finish(const RowMoments &m, const P *scale, const P *shift, T *out) const {
        constexpr int kBatch = kNormBatch<T, P>;
#pragma unroll
        for (int first = 0; first < PACKS; first += kBatch) {
            ParameterPack<P, V> scales[kBatch], shifts[kBatch];
#pragma unroll
            for (int p = first; p < first + kBatch && p < PACKS; ++p) {
                if (offset(p) < left) {
                    scales[p - first].read(scale + offset(p));
                    shifts[p - first].read(shift + offset(p));
                }
            }
#pragma unroll
            for (int p = first; p < first + kBatch && p < PACKS; ++p) {
                float v[V];
                modulate(packs[p], m, scales[p - first], shifts[p - first], v);
                if (offset(p) < left)
                    store<T, V>(out + offset(p), v);
            }
        }
    }
};

// The same, read anew in each pass. A lane reads only what it wrote to r itself.
template <typename T, int V> struct WarpRow<T, V, 0> {
    int left;
    const T *row;

    __device__ __forceinline__ WarpRow(const T *x, int left) : left(left), row(x) {}

    template <typename P> __device__ __forceinline__ void add(const T *y, const P *gate, T *r) {
#pragma unroll 2
        for (int at = 0; at < left; at += kWarp * V) {
            Pack<T, V> pack = load<T, V>(row + at);
            ParameterPack<P, V> factor;
            factor.fill(1.0f);
            if (gate)
                factor.read(gate + at);
            add_residual(pack, load<T, V>(y + at), factor);
            store_pack(r + at, pack);
        }
        row = r;
    }

    template <typename Body> __device__ __forceinline__ void each(Body body) const {
#pragma unroll 4
        for (int at = 0; at < left; at += kWarp * V)
            body(load<T, V>(row + at), true);
    }

    template <typename P>
    __device__ __forceinline__ void finish(const RowMoments &m, const P *scale, const P *shift, T *out) const {
#pragma unroll 2
        for (int at = 0; at < left; at += kWarp * V) {
            ParameterPack<P, V> factor, added;
            factor.read(scale + at);
            added.read(shift + at);
            float v[V];
            modulate(load<T, V>(row + at), m, factor, added, v);
            store<T, V>(out + at, v);
        }
    }
};

// Two passes, and what rounding took from the mean of the first is in the deviations of the second: the corrected
// two-pass algorithm of Chan, Golub & LeVeque, 1983. The values of a constant row are its mean, exactly.
template <typename T, int V, int PACKS>
__device__ __forceinline__ RowMoments row_moments(const WarpRow<T, V, PACKS> &row, float inverse, float eps) {
    float total = 0.0f;
    row.each([&](const Pack<T, V> &pack, bool) {
        float sum = 0.0f; // of one pack: the packs' chains of additions do not wait for each other
#pragma unroll
        for (int j = 0; j < V; ++j)
            sum += pack.get(j);
        total += sum;
    });
    const float mean = warp_sum(total) * inverse;
    float deviations = 0.0f, squares = 0.0f;
    row.each([&](const Pack<T, V> &pack, bool inside) {
        float sum = 0.0f, square = 0.0f;
#pragma unroll
        for (int j = 0; j < V; ++j) {
            const float deviation = pack.get(j) - mean;
            sum += deviation;
            square += deviation * deviation;
        }
        deviations += inside ? sum : 0.0f;
        squares += inside ? square : 0.0f;
    });
    const float lost = warp_sum(deviations) * inverse;
    const float variance = warp_sum(squares) * inverse - lost * lost;
    return {mean + lost, __frsqrt_rn((variance < 0.0f ? 0.0f : variance) + eps)}; // NaN stays
}

// Blocks of four warps on one SM, for rows of so many columns a lane: 64 registers a thread, 96 or 128.
template <int COLUMNS> constexpr int kNormForwardResidency = COLUMNS <= 24 ? 8 : COLUMNS <= 48 ? 5 : 4;

struct LayerNormForwardLaunch {
    LayerNormForward call;
    unsigned rows, blocks; // of one sample
    unsigned all_rows;
    float inverse; // 1 / d
};

template <typename T, int V, int PACKS, bool kResidual>
__global__ void __launch_bounds__(kNormForwardThreads, kNormForwardResidency<V * PACKS>)
    layer_norm_rows(const LayerNormForwardLaunch launch) {
    const LayerNormForward &a = launch.call;
    const LayerNormShape &s = a.shape;
    const unsigned sample = blockIdx.x / launch.blocks;
    const unsigned within = blockIdx.x % launch.blocks * kNormForwardRows + threadIdx.x / kWarp;
    if (within >= launch.rows)
        return;
    const unsigned index = sample * launch.rows + within;
    const int lane_column = threadIdx.x % kWarp * V;
    const int64_t start = index * s.d + lane_column;
    WarpRow<T, V, PACKS> row(static_cast<const T *>(a.x) + start, static_cast<int>(s.d) - lane_column);
    if constexpr (kResidual)
        for_parameters<T>(s.parameter_dtype, [&](auto element) {
            using P = decltype(element);
            const P *const gate =
                a.gate ? static_cast<const P *>(a.gate) + sample * a.gate_stride + lane_column : nullptr;
            row.add(static_cast<const T *>(a.y) + start, gate, static_cast<T *>(a.r) + start);
        });
    const RowMoments m = row_moments(row, launch.inverse, static_cast<float>(a.eps));
    if (threadIdx.x % kWarp == 0) {
        a.statistics[index] = m.mean;
        a.statistics[launch.all_rows + index] = m.rstd;
    }
    for_parameters<T>(s.parameter_dtype, [&](auto element) {
        using P = decltype(element);
        const P *const scale = static_cast<const P *>(a.scale) + sample * a.scale_stride + lane_column;
        const P *const shift = static_cast<const P *>(a.shift) + sample * a.shift_stride + lane_column;
        row.finish(m, scale, shift, static_cast<T *>(a.out) + start);
    });
}

template <typename T, int V, int PACKS, bool kResidual>
inline cudaError_t launch_layer_norm_rows(const LayerNormForward &a, cudaStream_t stream) {
    const LayerNormShape &s = a.shape;
    const int64_t blocks = ceil_div(s.rows, kNormForwardRows);
    if (s.rows > INT32_MAX / s.batch)
        return cudaErrorInvalidValue; // rows and blocks are counted in 32 bits
    auto kernel = layer_norm_rows<T, V, PACKS, kResidual>;
    const LayerNormForwardLaunch launch{a, static_cast<unsigned>(s.rows), static_cast<unsigned>(blocks),
                                        static_cast<unsigned>(s.batch * s.rows), 1.0f / static_cast<float>(s.d)};
    const dim3 grid(static_cast<unsigned>(s.batch * blocks));
    KF_LAUNCH(kernel, grid, dim3(kNormForwardThreads), 0, stream, launch);
    return cudaGetLastError();
}

// As few registers as the width allows: the lanes of a warp hold 24, 48 or 80 columns each. 80 in fp32 and what a
// residual needs do not fit 128 registers on every architecture.
template <typename T, int V, bool kResidual>
inline cudaError_t choose_layer_norm_rows(const LayerNormForward &a, cudaStream_t stream) {
    if constexpr (V > 1) {
        if (a.shape.d <= 24 * kWarp)
            return launch_layer_norm_rows<T, V, 24 / V, kResidual>(a, stream);
        if (a.shape.d <= 48 * kWarp)
            return launch_layer_norm_rows<T, V, 48 / V, kResidual>(a, stream);
        if constexpr (sizeof(T) == 2)
            if (a.shape.d <= 80 * kWarp)
                return launch_layer_norm_rows<T, V, 80 / V, kResidual>(a, stream);
    }
    return launch_layer_norm_rows<T, V, 0, kResidual>(a, stream);
}

inline bool valid_shape(const LayerNormShape &s) {
    return s.batch >= 0 && s.rows >= 0 && s.d >= 0 && s.d <= kNormWidestRow && is_dtype(static_cast<int>(s.dtype)) &&
           (s.parameter_dtype == s.dtype || s.parameter_dtype == DType::float32);
}

// 16-byte words where every row of every tensor starts on one, single elements elsewhere
template <typename... Strides>
inline int vector_width(const LayerNormShape &s, bool aligned, const Strides... parameter_strides) {
    const int vector = s.dtype == DType::float32 ? 4 : 8;
    const int parameter_vector = s.parameter_dtype == DType::float32 ? 4 : 8;
    return aligned && s.d % vector == 0 && ((parameter_strides % parameter_vector == 0) && ...) ? vector : 1;
}

template <bool kResidual> inline cudaError_t layer_norm_forward(const LayerNormForward &a, cudaStream_t stream) {
    const LayerNormShape &s = a.shape;
    if (!valid_shape(s))
        return cudaErrorInvalidValue;
    if (s.batch == 0 || s.rows == 0 || s.d == 0)
        return cudaSuccess;
    const bool aligned = aligned16(a.x, a.y, a.gate, a.scale, a.shift, a.r, a.out);
    const int vector = vector_width(s, aligned, a.gate_stride, a.scale_stride, a.shift_stride);
    return dispatch(s.dtype, vector, [&](auto element, auto width) {
        return choose_layer_norm_rows<decltype(element), decltype(width)::value, kResidual>(a, stream);
    });
}

} // namespace kolors_fast
