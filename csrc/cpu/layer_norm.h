// The row kernels of the LayerNorm family (LayerNormForward in arguments.h says what they compute).
//
// A row fits the first-level cache: it comes from memory once, and the passes over it (mean, deviations, output) find
// it there. The partition is by the shape alone, and partial sums are added in order, so that the result does not
// depend on the number of threads.
#pragma once

#include "../common/arguments.h"
#include "parallel.h"
#include "simd.h"
#include "tables.h"

#include <cmath>

namespace kolors_fast {
namespace KOLORS_FAST_ISA {
namespace {

constexpr int64_t kBlockRows = 64;           // whose gradients are summed in fp32 before the sums meet in fp64
constexpr int64_t kSerialElements = 1 << 15; // below this a second thread costs more than it saves
constexpr int kChains = 4;                   // of additions that do not wait for each other

inline int thread_count(const LayerNormShape &s) {
    return s.batch * s.rows * s.d < kSerialElements ? 1 : max_threads();
}

// Row `sample` of gate, scale or shift [batch, d] plus `added`, as a table of whole vectors; absent ones are filled.
inline void fill_table(const LayerNormShape &s, const void *values, int64_t stride, int64_t sample, float added,
                       float absent, float *table /* [padded(d)] */) {
    for_dtype(s.parameter_dtype, [&](auto element) {
        const auto *row = static_cast<const decltype(element) *>(values) + sample * stride;
        for_vectors(s.d, [&](int64_t i, auto vector) {
            store(table + i, values ? vector.load(row + i) + added : broadcast(absent));
        });
    });
}

// Rows [begin, end) of all samples as spans of one sample: calls body(sample, first row, end of the span).
template <typename Body> void for_samples(const LayerNormShape &s, int64_t begin, int64_t end, const Body &body) {
    while (begin < end) {
        const int64_t sample = begin / s.rows, stop = at_most(end, (sample + 1) * s.rows);
        body(sample, begin, stop);
        begin = stop;
    }
}

// totals[k] = the sum over a row of what body(i, access, sums) adds to sums[k].
template <int kSums, typename Body>
KOLORS_FAST_INLINE void sum_row(int64_t count, double (&totals)[kSums], const Body &body) {
    Floats sums[kChains][kSums] = {};
    int64_t i = 0;
    for (; i + kChains * kWidth <= count; i += kChains * kWidth)
        for (int chain = 0; chain < kChains; ++chain)
            body(i + chain * kWidth, Whole{}, sums[chain]);
    for_vectors(count - i, [&](int64_t k, auto vector) { body(i + k, vector, sums[0]); });
    for (int k = 0; k < kSums; ++k)
        totals[k] = sum_lanes((sums[0][k] + sums[1][k]) + (sums[2][k] + sums[3][k]));
}

KOLORS_FAST_INLINE Floats rounded(Floats value, float) { return value; }
template <typename T> KOLORS_FAST_INLINE Floats rounded(Floats value, T type) {
    return widen(narrow(value, type), type);
}

// ---- forward

// Rows of fp32 wait for memory, those of 16 bits for their conversions. So while one pass works from the cache, the
// lines of the next come near: those of `out` while the first pass reads, the next row while the second does. On a
// Zen 4 a tenth to a third faster; rows of 16 bits gained nothing.
template <typename T> constexpr bool kPrefetches = sizeof(T) == sizeof(float);

struct Moments {
    float mean, rstd;
};

// Two passes, and what rounding took from the mean of the first is in the deviations of the second: the corrected
// two-pass algorithm of Chan, Golub & LeVeque, 1983. The values of a constant row are its mean, exactly.
template <typename T>
KOLORS_FAST_INLINE Moments moments(const T *row, double sum, int64_t d, double eps, const T *next, const T *next_y) {
    const float mean = static_cast<float>(sum / d);
    double totals[2];
    sum_row(d, totals, [&](int64_t i, auto vector, Floats *sums) {
        if (kPrefetches<T>) {
            __builtin_prefetch(next + i, 0, 2);
            __builtin_prefetch(next_y + i, 0, 2);
        }
        const Floats deviation = vector.only(vector.load(row + i) - mean);
        sums[0] += deviation;
        sums[1] += deviation * deviation;
    });
    const double variance = (totals[1] - totals[0] * totals[0] / d) / d;
    return {static_cast<float>(mean + totals[0] / d),
            static_cast<float>(1.0 / std::sqrt((variance < 0 ? 0 : variance) + eps))};
}

template <typename T> struct ForwardRows {
    const LayerNormForward &a;
    float scale_added; // 1 where the factor is 1 + scale
    int64_t d = a.shape.d, slots = padded(d);
    int threads = thread_count(a.shape);
    Workspace<float> tables = workspace<float>(threads * 3 * slots); // factor, shift, gate

    void run() const {
        parallel_for(a.shape.batch * a.shape.rows, threads, [&](int64_t begin, int64_t end, int thread) {
            float *factor = tables.get() + thread * 3 * slots, *shift = factor + slots, *gate = shift + slots;
            for_samples(a.shape, begin, end, [&](int64_t sample, int64_t row, int64_t stop) {
                fill_table(a.shape, a.scale, a.scale_stride, sample, scale_added, 1, factor);
                fill_table(a.shape, a.shift, a.shift_stride, sample, 0, 0, shift);
                if (a.y)
                    fill_table(a.shape, a.gate, a.gate_stride, sample, 0, 1, gate);
                for (; row < stop; ++row)
                    normalise(row, factor, shift, gate);
            });
        });
    }

    void normalise(int64_t row, const float *factor, const float *shift, const float *gate) const {
        const T *x = static_cast<const T *>(a.x) + row * d, *y = static_cast<const T *>(a.y ? a.y : a.x) + row * d;
        T *r = a.y ? static_cast<T *>(a.r) + row * d : nullptr, *out = static_cast<T *>(a.out) + row * d;
        double sum[1];
        if (a.y)
            sum_row(d, sum, [&](int64_t i, auto vector, Floats *sums) {
                if (kPrefetches<T>)
                    __builtin_prefetch(out + i, 1);
                const Floats value = rounded(vector.load(x + i) + load(gate + i) * vector.load(y + i), T{});
                vector.store(r + i, value);
                sums[0] += vector.only(value);
            });
        else
            sum_row(d, sum, [&](int64_t i, auto vector, Floats *sums) {
                if (kPrefetches<T>)
                    __builtin_prefetch(out + i, 1);
                sums[0] += vector.load(x + i);
            });
        const T *values = a.y ? r : x;
        const Moments m = moments(values, sum[0], d, a.eps, x + d, y + d);
        for_vectors(d, [&](int64_t i, auto vector) {
            vector.store(out + i, (vector.load(values + i) - m.mean) * m.rstd * load(factor + i) + load(shift + i));
        });
        a.statistics[row] = m.mean;
        a.statistics[a.shape.batch * a.shape.rows + row] = m.rstd;
    }
};

inline void layer_norm_forward(const LayerNormForward &a, float scale_added) {
    for_dtype(a.shape.dtype, [&](auto element) { ForwardRows<decltype(element)>{a, scale_added}.run(); });
}

// ---- backward

// With g = grad_out and rhat = (r - mean) * rstd:
//   dr = rstd * (g * factor - rhat * m2 - m1) + grad_r,   m1, m2 = mean of g * factor and of g * factor * rhat
//   grad_x = dr, grad_y = gate * dr;  sums over rows: grad_gate of dr * y, grad_scale of g * rhat, grad_shift of g
template <typename T> struct BackwardRows {
    const LayerNormBackward &a;
    float scale_added;
    int64_t d = a.shape.d, slots = padded(d), all_rows = a.shape.batch * a.shape.rows;
    int64_t blocks = ceil_div(a.shape.rows, kBlockRows); // of one sample
    int threads = thread_count(a.shape);
    Workspace<float> partial = workspace<float>(a.shape.batch * blocks * 3 * slots); // scale, shift, gate
    Workspace<float> tables = workspace<float>(threads * 2 * slots);                 // factor, gate

    void run() const {
        parallel_for(a.shape.batch * blocks, threads, [&](int64_t begin, int64_t end, int thread) {
            float *factor = tables.get() + thread * 2 * slots, *gate = factor + slots;
            for (int64_t block = begin, filled = -1; block < end; ++block) {
                const int64_t sample = block / blocks, first = block % blocks * kBlockRows;
                if (sample != filled) {
                    fill_table(a.shape, a.scale, a.scale_stride, sample, scale_added, 1, factor);
                    fill_table(a.shape, a.gate, a.gate_stride, sample, 0, 1, gate);
                    filled = sample;
                }
                float *sums = partial.get() + block * 3 * slots;
                std::memset(sums, 0, 3 * slots * sizeof(float));
                int64_t row = sample * a.shape.rows + first;
                const int64_t stop = sample * a.shape.rows + at_most(first + kBlockRows, a.shape.rows);
                for (; row + 2 <= stop; row += 2)
                    differentiate<2>(row, factor, gate, sums);
                if (row < stop)
                    differentiate<1>(row, factor, gate, sums);
            }
        });
        parallel_for(a.shape.batch * slots / kWidth, threads, [&](int64_t begin, int64_t end, int) {
            for (int64_t vector = begin; vector < end; ++vector)
                reduce(vector * kWidth / slots, vector * kWidth % slots);
        });
    }

    // kRows rows, whose column sums make one trip through memory.
    template <int kRows>
    void differentiate(int64_t row, const float *factor, const float *gate, float *sum_scale) const {
        const T *r = static_cast<const T *>(a.r) + row * d, *g = static_cast<const T *>(a.grad_out) + row * d;
        const float *mean = a.statistics + row, *rstd = a.statistics + all_rows + row;
        float *sum_shift = sum_scale + slots;
        double totals[2 * kRows];
        sum_row(d, totals, [&](int64_t i, auto vector, Floats *sums) {
            Floats shift = {}, scale = {};
            for (int k = 0; k < kRows; ++k) {
                const Floats dy = vector.load(g + k * d + i), dy_factor = dy * load(factor + i);
                const Floats rhat = (vector.load(r + k * d + i) - mean[k]) * rstd[k];
                sums[2 * k] += dy_factor;
                sums[2 * k + 1] += dy_factor * rhat;
                shift += dy;
                scale += dy * rhat;
            }
            store(sum_shift + i, load(sum_shift + i) + shift);
            store(sum_scale + i, load(sum_scale + i) + scale);
        });
        if (!a.grad_x && !a.grad_y && !a.grad_gate)
            return;
        float m1[kRows], m2[kRows];
        for (int k = 0; k < kRows; ++k) {
            m1[k] = static_cast<float>(totals[2 * k] / d);
            m2[k] = static_cast<float>(totals[2 * k + 1] / d);
        }
        finish<kRows>(row, factor, gate, m1, m2, sum_shift + slots);
    }

    template <int kRows> void finish(int64_t row, const float *factor, const float *gate, const float *m1,
                                     const float *m2, float *sum_gate) const {
        const T *r = static_cast<const T *>(a.r) + row * d, *g = static_cast<const T *>(a.grad_out) + row * d;
        const T *grad_r = a.grad_r ? static_cast<const T *>(a.grad_r) + row * d : nullptr;
        const T *y = a.grad_gate ? static_cast<const T *>(a.y) + row * d : nullptr;
        T *grad_x = a.grad_x ? static_cast<T *>(a.grad_x) + row * d : nullptr;
        T *grad_y = a.grad_y ? static_cast<T *>(a.grad_y) + row * d : nullptr;
        const float *mean = a.statistics + row, *rstd = a.statistics + all_rows + row;
        for_vectors(d, [&](int64_t i, auto vector) {
            Floats gates = {};
            for (int k = 0; k < kRows; ++k) {
                const int64_t at = k * d + i;
                const Floats rhat = (vector.load(r + at) - mean[k]) * rstd[k];
                // m1 comes last: fused with the product it would not cancel to zero in a row of one element
                Floats dr = (vector.load(g + at) * load(factor + i) - rhat * m2[k] - m1[k]) * rstd[k];
                if (grad_r)
                    dr += vector.load(grad_r + at);
                if (grad_x)
                    vector.store(grad_x + at, dr);
                if (grad_y)
                    vector.store(grad_y + at, dr * load(gate + i));
                if (y)
                    gates += dr * vector.load(y + at);
            }
            if (y)
                store(sum_gate + i, load(sum_gate + i) + gates);
        });
    }

    // The sums of one vector of columns over the blocks of a sample, in order.
    void reduce(int64_t sample, int64_t column) const {
        float *const targets[] = {a.grad_scale, a.grad_shift, a.grad_gate};
        for (int k = 0; k < 3; ++k) {
            if (!targets[k])
                continue;
            double total[kWidth] = {};
            const float *from = partial.get() + (sample * blocks * 3 + k) * slots + column;
            for (int64_t block = 0; block < blocks; ++block, from += 3 * slots)
                for (int lane = 0; lane < kWidth; ++lane)
                    total[lane] += from[lane];
            for (int64_t lane = 0; lane < at_most(kWidth, d - column); ++lane)
                targets[k][sample * d + column + lane] = static_cast<float>(total[lane]);
        }
    }
};

inline void layer_norm_backward(const LayerNormBackward &a, float scale_added) {
    for_dtype(a.shape.dtype, [&](auto element) { BackwardRows<decltype(element)>{a, scale_added}.run(); });
}

} // namespace
} // namespace KOLORS_FAST_ISA
} // namespace kolors_fast
