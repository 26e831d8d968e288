// y = x * rstd * weight with rstd = 1 / sqrt(mean(x^2) + eps), over rows of x [rows, features].
#include "isa.h"
#include "parallel.h"
#include "simd.h"

#include <memory>

namespace kolors_fast {
namespace KOLORS_FAST_ISA {
namespace {

constexpr int64_t kSerialElements = 1 << 14; // below this a second thread costs more than it saves
constexpr int64_t kBlockElements = 1 << 16;  // of the rows whose weight gradients are summed by one thread
constexpr int64_t kBlockRows = 32;           // bounds the rounding error of those sums, which are in fp32

int threads_for(int64_t rows, int64_t features) { return rows * features < kSerialElements ? 1 : max_threads(); }

// The sum of the lanes, by halves.
template <typename Vector> KOLORS_FAST_INLINE float sum_halves(Vector value) {
    if constexpr (sizeof(Vector) == 8) {
        return value[0] + value[1];
    } else {
        typedef float Narrow __attribute__((vector_size(sizeof(Vector) / 2)));
        struct Parts {
            Narrow low, high;
        };
        const Parts parts = bit_cast<Parts>(value);
        return sum_halves(parts.low + parts.high);
    }
}

// sum of term(first element, Whole or Rest) over a row; term is zero in the lanes that are not there.
template <typename Term> KOLORS_FAST_INLINE float sum_row(int64_t features, const Term &term) {
    Floats sums[4] = {}; // four chains of additions instead of one
    int64_t i = 0;
    for (; i + 4 * kWidth <= features; i += 4 * kWidth)
        for (int k = 0; k < 4; ++k)
            sums[k] += term(i + k * kWidth, Whole{});
    for (; i + kWidth <= features; i += kWidth)
        sums[0] += term(i, Whole{});
    if (i < features)
        sums[1] += term(i, Rest{features - i});
    return sum_halves((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// weight as fp32: itself, or a copy; ones where there is none.
class Weight {
    std::unique_ptr<float[]> copy_;
    const float *data_;

  public:
    Weight(const void *weight, DType dtype, int64_t features) : data_(static_cast<const float *>(weight)) {
        if (weight && dtype == DType::float32)
            return;
        copy_.reset(new float[features]);
        data_ = copy_.get();
        if (!weight)
            for (int64_t i = 0; i < features; ++i)
                copy_[i] = 1.0f;
        else
            for_dtype(dtype, [&](auto element) {
                const auto *from = static_cast<const decltype(element) *>(weight);
                for_vectors(features, [&](int64_t i, auto vector) { vector.store(&copy_[i], vector.load(from + i)); });
            });
    }

    const float *data() const { return data_; }
};

template <typename T> void forward(const RmsNormForward &a) {
    const Weight table(a.weight, a.weight_dtype, a.features);
    const float *weight = table.data();
    const double features = static_cast<double>(a.features);
    parallel_for(a.rows, threads_for(a.rows, a.features), [&](int64_t begin, int64_t end, int) {
        for (int64_t row = begin; row < end; ++row) {
            const T *x = static_cast<const T *>(a.x) + row * a.row_stride;
            T *y = static_cast<T *>(a.y) + row * a.features;
            const float squares = sum_row(a.features, [&](int64_t i, auto vector) {
                const Floats value = vector.load(x + i); // zero in the lanes that are not there
                return value * value;
            });
            // a rounding here would be one of the whole row
            const float rstd = static_cast<float>(1.0 / __builtin_sqrt(squares / features + a.eps));
            a.rstd[row] = rstd;
            for_vectors(a.features, [&](int64_t i, auto vector) {
                vector.store(y + i, vector.load(x + i) * rstd * vector.load(weight + i));
            });
        }
    });
}

// With x_hat = x * rstd and g = grad_y * weight: grad_x = rstd * (g - x_hat * mean(g * x_hat)),
// grad_weight = sum over rows of grad_y * x_hat, of each block of rows first and then of the blocks in their order.
template <typename T> struct Backward {
    const RmsNormBackward &a;
    Weight weight{a.weight, a.weight_dtype, a.features};
    int64_t block_rows = rows_of_a_block(a.features);
    int64_t blocks = (a.rows + block_rows - 1) / block_rows;
    std::unique_ptr<float[]> sums{a.grad_weight ? new float[blocks * a.features] : nullptr}; // [blocks, features]

    static int64_t rows_of_a_block(int64_t features) {
        const int64_t rows = kBlockElements / features;
        return rows < 8 ? 8 : rows < kBlockRows ? rows : kBlockRows;
    }

    void run() const {
        const int threads = threads_for(a.rows, a.features);
        parallel_for(blocks, threads, [&](int64_t begin, int64_t end, int) {
            for (int64_t block = begin; block < end; ++block)
                run_block(block);
        });
        if (a.grad_weight)
            parallel_for((a.features + kWidth - 1) / kWidth, threads, [&](int64_t begin, int64_t end, int) {
                for (int64_t i = begin * kWidth; i < end * kWidth && i < a.features; i += kWidth)
                    add_blocks(i, i + kWidth < a.features ? i + kWidth : a.features);
            });
    }

    void run_block(int64_t block) const {
        float *sum = a.grad_weight ? sums.get() + block * a.features : nullptr;
        if (sum)
            for_vectors(a.features, [&](int64_t i, auto vector) { vector.store(sum + i, Floats{}); });
        const int64_t end = (block + 1) * block_rows;
        for (int64_t row = block * block_rows; row < (end < a.rows ? end : a.rows); ++row)
            run_row(row, sum);
    }

    void run_row(int64_t row, float *sum) const {
        const T *x = static_cast<const T *>(a.x) + row * a.row_stride;
        const T *grad_y = static_cast<const T *>(a.grad_y) + row * a.features;
        const float *w = weight.data();
        const float rstd = a.rstd[row];
        T *grad_x = a.grad_x ? static_cast<T *>(a.grad_x) + row * a.features : nullptr;
        float mean = 0.0f; // of g * x_hat
        if (grad_x)
            mean = sum_row(a.features,
                           [&](int64_t i, auto vector) {
                               return vector.load(grad_y + i) * vector.load(w + i) * (vector.load(x + i) * rstd);
                           }) /
                   static_cast<float>(a.features);
        for_vectors(a.features, [&](int64_t i, auto vector) {
            const Floats g = vector.load(grad_y + i), x_hat = vector.load(x + i) * rstd;
            if (grad_x)
                vector.store(grad_x + i, rstd * (g * vector.load(w + i) - x_hat * mean));
            if (sum)
                vector.store(sum + i, vector.load(sum + i) + g * x_hat);
        });
    }

    void add_blocks(int64_t begin, int64_t end) const {
        double totals[kWidth] = {};
        for (int64_t block = 0; block < blocks; ++block)
            for (int64_t i = begin; i < end; ++i)
                totals[i - begin] += sums[block * a.features + i];
        for (int64_t i = begin; i < end; ++i)
            a.grad_weight[i] = static_cast<float>(totals[i - begin]);
    }
};

} // namespace

void rms_norm_forward(const RmsNormForward &a) {
    for_dtype(a.dtype, [&](auto element) { forward<decltype(element)>(a); });
}

void rms_norm_backward(const RmsNormBackward &a) {
    for_dtype(a.dtype, [&](auto element) { Backward<decltype(element)>{a}.run(); });
}

} // namespace KOLORS_FAST_ISA
} // namespace kolors_fast
