// y = x * rstd * weight with rstd = 1 / sqrt(mean(x^2) + eps), for short rows: a head of a token. Backward, with
// g = grad * weight:  grad_x = rstd * (g - x * rstd^2 * mean(g * x)),  grad_weight = sum of grad * x * rstd.
//
// Work is cut into blocks of tokens of one part, whatever the number of threads. A block takes as many rows at once
// as a vector has lanes: their sums are turned into one vector of rstd, and the second pass over them reads the first
// level cache. Each block leaves its sum of grad_weight, and these are added in their order.
#include "isa.h"
#include "parallel.h"
#include "simd.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

namespace kolors_fast {
namespace KOLORS_FAST_ISA {
namespace {

constexpr int64_t kBlockElements = 1 << 13;  // of a block: it stays in the first level cache
constexpr int64_t kSerialElements = 1 << 15; // below this a second thread costs more than it saves

// The blocks of all parts, numbered through.
struct Blocks {
    const QkNorm &a;
    int64_t tokens; // of a block
    int64_t first[kQkNormParts + 1];

    explicit Blocks(const QkNorm &arguments) : a(arguments) {
        tokens = kBlockElements / std::max<int64_t>(1, a.heads * a.head_dim);
        tokens = std::max<int64_t>(1, tokens);
        first[0] = 0;
        for (int p = 0; p < a.count; ++p)
            first[p + 1] = first[p] + (a.batch * a.parts[p].tokens + tokens - 1) / tokens;
    }

    int64_t count() const { return first[a.count]; }
    int threads() const {
        int64_t rows = 0;
        for (int p = 0; p < a.count; ++p)
            rows += a.batch * a.parts[p].tokens * a.heads;
        return rows * a.head_dim < kSerialElements ? 1 : max_threads();
    }

    int part_of(int64_t block) const {
        int p = 0;
        while (block >= first[p + 1])
            ++p;
        return p;
    }
};

// Where a row begins in each tensor that has it.
struct Row {
    int64_t sample, token, head;

    template <typename T, typename Data> T *in(const QkNormRows<Data> &rows) const {
        return static_cast<T *>(rows.data) + sample * rows.batch + token * rows.token + head * rows.head;
    }
};

// The rows of one block, kWidth at a time: calls body(rows, count).
template <typename Body> KOLORS_FAST_INLINE void for_rows(const Blocks &blocks, int64_t block, const Body &body) {
    const QkNorm &a = blocks.a;
    const int p = blocks.part_of(block);
    const int64_t all = a.parts[p].tokens;
    const int64_t begin = (block - blocks.first[p]) * blocks.tokens * a.heads;
    const int64_t end = std::min(begin + blocks.tokens * a.heads, a.batch * all * a.heads);
    Row row{begin / a.heads / all, begin / a.heads % all, 0};
    for (int64_t i = begin; i < end; i += kWidth) {
        const int count = static_cast<int>(std::min<int64_t>(kWidth, end - i));
        Row rows[kWidth];
        for (int k = 0; k < count; ++k) {
            rows[k] = row;
            if (++row.head == a.heads) {
                row.head = 0;
                if (++row.token == all) {
                    row.token = 0;
                    ++row.sample;
                }
            }
        }
        body(rows, count);
    }
}

KOLORS_FAST_INLINE Floats square_root(Floats x) {
    for (int lane = 0; lane < kWidth; ++lane)
        x[lane] = std::sqrt(x[lane]);
    return x;
}

// 1 / sqrt(sum / head_dim + eps) of kWidth rows at once
KOLORS_FAST_INLINE Floats rstd_of(Floats sums, const QkNorm &a) {
    return 1.0f / square_root(sums * static_cast<float>(1.0 / a.head_dim) + static_cast<float>(a.eps));
}

// weight [D] in fp32
std::unique_ptr<float[]> widened(const void *weight, const QkNorm &a) {
    std::unique_ptr<float[]> wide(new float[a.head_dim]);
    for (int64_t i = 0; i < a.head_dim; ++i)
        wide[i] = read_scalar(weight, i, a.weight_dtype);
    return wide;
}

struct Weights {
    std::unique_ptr<float[]> of_part[kQkNormParts];

    explicit Weights(const QkNorm &a) {
        for (int p = 0; p < a.count; ++p)
            if (a.parts[p].weight)
                of_part[p] = widened(a.parts[p].weight, a);
    }
};

template <typename T> void copy_block(const Blocks &blocks, int64_t block, const QkNormRows<const void> &from) {
    const QkNormPart &part = blocks.a.parts[blocks.part_of(block)];
    for_rows(blocks, block, [&](const Row *rows, int count) {
        for (int k = 0; k < count; ++k)
            std::memcpy(rows[k].in<T>(part.y), rows[k].in<const T>(from), blocks.a.head_dim * sizeof(T));
    });
}

template <typename T> void forward_block(const Blocks &blocks, int64_t block, const Weights &weights) {
    const QkNorm &a = blocks.a;
    const int p = blocks.part_of(block);
    const QkNormPart &part = a.parts[p];
    if (!part.weight)
        return copy_block<T>(blocks, block, part.x);
    const float *weight = weights.of_part[p].get();
    for_rows(blocks, block, [&](const Row *rows, int count) {
        Floats sums = {};
        for (int k = 0; k < count; ++k) {
            const T *x = rows[k].in<const T>(part.x);
            Floats squares = {};
            for_vectors(a.head_dim, [&](int64_t i, auto vector) {
                const Floats value = vector.load(x + i);
                squares += value * value;
            });
            sums[k] = static_cast<float>(sum_lanes(squares));
        }
        const Floats rstd = rstd_of(sums, a);
        for (int k = 0; k < count; ++k) {
            const T *x = rows[k].in<const T>(part.x);
            T *y = rows[k].in<T>(part.y);
            const float factor = rstd[k];
            for_vectors(a.head_dim, [&](int64_t i, auto vector) {
                vector.store(y + i, vector.load(x + i) * factor * vector.load(weight + i));
            });
        }
    });
}

template <typename T>
void backward_block(const Blocks &blocks, int64_t block, const Weights &weights, float *grad_weight) {
    const QkNorm &a = blocks.a;
    const int p = blocks.part_of(block);
    const QkNormPart &part = a.parts[p];
    if (!part.weight)
        return copy_block<T>(blocks, block, part.grad);
    const float *weight = weights.of_part[p].get();
    if (grad_weight)
        std::memset(grad_weight, 0, a.head_dim * sizeof(float));
    for_rows(blocks, block, [&](const Row *rows, int count) {
        Floats sums = {}, dots = {};
        for (int k = 0; k < count; ++k) {
            const T *x = rows[k].in<const T>(part.x), *grad = rows[k].in<const T>(part.grad);
            Floats squares = {}, products = {};
            for_vectors(a.head_dim, [&](int64_t i, auto vector) {
                const Floats value = vector.load(x + i);
                squares += value * value;
                products += value * (vector.load(grad + i) * vector.load(weight + i));
            });
            sums[k] = static_cast<float>(sum_lanes(squares));
            dots[k] = static_cast<float>(sum_lanes(products));
        }
        const Floats rstd = rstd_of(sums, a);
        const Floats shrink = rstd * rstd * (dots * static_cast<float>(1.0 / a.head_dim));
        for (int k = 0; k < count; ++k) {
            const T *x = rows[k].in<const T>(part.x), *grad = rows[k].in<const T>(part.grad);
            T *grad_x = part.y.data ? rows[k].in<T>(part.y) : nullptr;
            const float factor = rstd[k], back = shrink[k];
            for_vectors(a.head_dim, [&](int64_t i, auto vector) {
                const Floats value = vector.load(x + i), g = vector.load(grad + i);
                if (grad_x)
                    vector.store(grad_x + i, factor * (g * vector.load(weight + i) - value * back));
                if (grad_weight)
                    vector.store(grad_weight + i, vector.load(grad_weight + i) + g * (value * factor));
            });
        }
    });
}

} // namespace

void qk_norm_forward(const QkNorm &a) {
    const Blocks blocks(a);
    const Weights weights(a);
    for_dtype(a.dtype, [&](auto element) {
        parallel_for(blocks.count(), blocks.threads(), [&](int64_t begin, int64_t end, int) {
            for (int64_t block = begin; block < end; ++block)
                forward_block<decltype(element)>(blocks, block, weights);
        });
    });
}

void qk_norm_backward(const QkNorm &a) {
    const Blocks blocks(a);
    const Weights weights(a);
    std::unique_ptr<float[]> sums(new float[blocks.count() * a.head_dim]);
    for_dtype(a.dtype, [&](auto element) {
        parallel_for(blocks.count(), blocks.threads(), [&](int64_t begin, int64_t end, int) {
            for (int64_t block = begin; block < end; ++block) {
                const QkNormPart &part = a.parts[blocks.part_of(block)];
                backward_block<decltype(element)>(blocks, block, weights,
                                                  part.grad_weight ? sums.get() + block * a.head_dim : nullptr);
            }
        });
    });
    for (int p = 0; p < a.count; ++p)
        for (int64_t i = 0; a.parts[p].grad_weight && i < a.head_dim; ++i) {
            double total = 0;
            for (int64_t block = blocks.first[p]; block < blocks.first[p + 1]; ++block)
                total += sums[block * a.head_dim + i];
            a.parts[p].grad_weight[i] = static_cast<float>(total);
        }
}

} // namespace KOLORS_FAST_ISA
} // namespace kolors_fast
