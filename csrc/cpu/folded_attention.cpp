// y = sum over heads of softmax(x K_h + bias) V_h + out_bias: attention to few keys, with the projections of queries
// and outputs multiplied into keys and values before. Each tile of rows passes both products and the softmax between
// them in a first-level cache.
#include "isa.h"
#include "parallel.h"
#include "product.h"
#include "softmax.h"

namespace kolors_fast {
namespace KOLORS_FAST_ISA {
namespace {

// softmax of `count` logits in place; the lanes of the last vector beyond them stay.
KOLORS_FAST_INLINE void softmax(float *logits, int64_t count) {
    Floats most = broadcast(kLowest), total = {};
    for (int64_t i = 0; i < count; i += kWidth)
        most = larger(before(count - i) ? load(logits + i) : broadcast(kLowest), most);
    const float largest = max_lanes(most);
    for (int64_t i = 0; i < count; i += kWidth) {
        const Floats logit = load(logits + i), weight = exp_minus(largest - logit);
        const auto there = before(count - i);
        total += there ? weight : Floats{};
        store(logits + i, there ? weight : logit);
    }
    const float scale = static_cast<float>(1.0 / sum_lanes(total));
    for (int64_t i = 0; i < count; i += kWidth) {
        const Floats weight = load(logits + i);
        store(logits + i, before(count - i) ? weight * scale : weight);
    }
}

// Rows by all panels of a packed factor, each sum beginning as its column's bias.
template <int kRows> KOLORS_FAST_INLINE void multiply_all(const float *tile, const float *packed, const float *bias,
                                                          int64_t depth, int64_t width, float *y, int64_t stride) {
    for (int64_t at = 0; at < panels(width) * kHalfPanel; at += kWidth) { // of the left halves
        const int64_t panel = at / kHalfPanel, left = panel * kPanel + at % kHalfPanel, right = left + kHalfPanel;
        const float *from = packed + panel * kPanel * depth + at % kHalfPanel;
        Floats sums[2 * kRows];
        multiply(tile, from, from + kPanel * depth, depth, load_columns(bias, left, width),
                 load_columns(bias, right, width), sums, std::make_integer_sequence<int, kRows>{});
        for (int r = 0; r < kRows; ++r) {
            store_columns(y + r * stride, sums[2 * r], left, width);
            store_columns(y + r * stride, sums[2 * r + 1], right, width);
        }
    }
}

template <int kRows> void attend(const FoldedAttention &a, int64_t sample, int64_t row, float *memory) {
    const int64_t columns = a.heads * a.keys, stride = panels(columns) * kPanel + kWidth; // the softmax reads beyond
    float *tile = memory, *logits = tile + kRows * a.dim, *weights = logits + kRows * stride;
    const float *x = a.x + (sample * a.tokens + row) * a.dim;
    pack_tile(x, a.dim, kRows, a.dim, tile);
    multiply_all<kRows>(tile, a.packed_keys + sample * panels(columns) * kPanel * a.dim, a.bias + sample * columns,
                        a.dim, columns, logits, stride);
    for (int r = 0; r < kRows; ++r)
        for (int64_t head = 0; head < a.heads; ++head)
            softmax(logits + r * stride + head * a.keys, a.keys);
    pack_tile(logits, stride, kRows, columns, weights);
    multiply_all<kRows>(weights, a.packed_values + sample * panels(a.dim) * kPanel * columns, a.out_bias, columns,
                        a.dim, a.y + (sample * a.tokens + row) * a.dim, a.dim);
}

} // namespace

void folded_attention(const FoldedAttention &a) {
    const int64_t columns = a.heads * a.keys, stride = panels(columns) * kPanel + kWidth;
    const Tiles cut(a.tokens);
    parallel_for(a.batch * cut.count, max_threads(), [&](int64_t begin, int64_t end, int) {
        float *memory = scratch(kTileRows * (a.dim + stride + columns));
        for (int64_t i = begin; i < end; ++i) {
            const int64_t sample = i / cut.count, row = cut.first(i % cut.count);
            for_tile_rows(cut.first(i % cut.count + 1) - row,
                          [&](auto rows) { attend<rows.value>(a, sample, row, memory); });
        }
    });
}

} // namespace KOLORS_FAST_ISA
} // namespace kolors_fast
