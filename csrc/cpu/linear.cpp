// y = x w^T + bias + add, or its gelu in the tanh form; or, with the columns of w in two halves value and gate,
// y = value * gelu(gate).
#include "gauss.h"
#include "isa.h"
#include "parallel.h"
#include "product.h"

namespace kolors_fast {
namespace KOLORS_FAST_ISA {
namespace {

constexpr int64_t kSerialProducts = 1 << 17; // below this a second thread costs more than it saves
// A quarter each of the smallest second-level cache in use, 1 MB: tiles of x, and the panels that all of them meet in
// turn. Deeper products are summed in parts, so that more than one tile fits.
constexpr int64_t kTilesBytes = 1 << 18, kPanelsBytes = 1 << 18, kMostDepth = 1 << 11;

// The columns of w in the left and the right half of a panel: those from left and right on, up to the ends.
struct Columns {
    int64_t left, right, left_end, right_end;

    Columns(const LinearShape &s, int64_t panel)
        : left(panel * (s.gated ? kHalfPanel : kPanel)), right(left + (s.gated ? s.width : kHalfPanel)),
          left_end(s.width), right_end(s.gated ? 2 * s.width : s.width) {}
};

int64_t panels_of(const LinearShape &s) { return ceil_div(s.width, s.gated ? kHalfPanel : kPanel); }

// x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) = x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3))
KOLORS_FAST_INLINE Floats gelu_tanh(Floats x) { return x * sigmoid(x * (x * x * 0.07135482f + 1.5957691f)); }

// A part of the depth.
struct Depth {
    int64_t first, count;
};

// One tile by one panel, `row` the tile's first. The parts of the depth add up in y.
template <int kRows> KOLORS_FAST_INLINE void multiply_and_store(const Linear &a, int64_t row, const float *tile,
                                                                int64_t panel, Depth depth, const float *ahead) {
    const LinearShape &s = a.shape;
    const Columns columns(s, panel);
    const float *bias = depth.first == 0 ? a.bias : nullptr, *add = depth.first == 0 ? a.add : a.y;
    const float *weight = a.packed + (panel * s.depth + depth.first) * kPanel;
    for (int at = 0; at < kHalfPanel; at += kWidth) {
        const int64_t left = columns.left + at, right = columns.right + at;
        // or stores would wait for lines of y, and those of the sums behind them
        for (int r = 0; r < kRows; ++r)
            for (const int64_t column : {left, right})
                __builtin_prefetch(a.y + (row + r) * s.width + column, 1);
        Floats sums[2 * kRows];
        multiply(tile, weight + at, ahead, depth.count, load_columns(bias, left, columns.left_end),
                 load_columns(bias, right, columns.right_end), sums, std::make_integer_sequence<int, kRows>{});
        for (int r = 0; r < kRows; ++r) {
            const int64_t offset = (row + r) * s.width;
            if (s.gated) {
                const Floats gate = sums[2 * r + 1];
                store_columns(a.y + offset, sums[2 * r] * (gate * gauss(gate, float{}).cdf), left, columns.left_end);
                continue;
            }
            if (add) {
                sums[2 * r] += load_columns(add + offset, left, columns.left_end);
                sums[2 * r + 1] += load_columns(add + offset, right, columns.right_end);
            }
            if (a.gelu) {
                sums[2 * r] = gelu_tanh(sums[2 * r]);
                sums[2 * r + 1] = gelu_tanh(sums[2 * r + 1]);
            }
            store_columns(a.y + offset, sums[2 * r], left, columns.left_end);
            store_columns(a.y + offset, sums[2 * r + 1], right, columns.right_end);
        }
    }
}

// Rows [first, first + count) by the panels [begin, end).
void multiply_rows(const Linear &a, int64_t first, int64_t count, int64_t begin, int64_t end, Depth depth,
                   float *tiles) {
    const Tiles cut(count);
    for (int64_t t = 0; t < cut.count; ++t)
        pack_tile(a.x + (first + cut.first(t)) * a.row_stride + depth.first, a.row_stride,
                  cut.first(t + 1) - cut.first(t), depth.count, tiles + cut.first(t) * depth.count);
    const int64_t group = std::max<int64_t>(1, kPanelsBytes / (kPanel * sizeof(float) * depth.count));
    for (int64_t panel = begin; panel < end; panel += group) {
        const int64_t after = std::min(panel + group, end);
        const float *ahead = a.packed + (after * a.shape.depth + depth.first) * kPanel; // the next group's
        int64_t fetched = 0;
        for (int64_t t = 0; t < cut.count; ++t)
            for_tile_rows(cut.first(t + 1) - cut.first(t), [&](auto rows) {
                const float *tile = tiles + cut.first(t) * depth.count;
                for (int64_t p = panel; p < after; ++p) {
                    multiply_and_store<rows.value>(a, first + cut.first(t), tile, p, depth, ahead);
                    if (fetched++ < 2 * (after - panel)) // each fetched half a panel
                        ahead += kLine * depth.count;
                }
            });
    }
}

} // namespace

void pack_linear(const PackLinear &a) {
    const LinearShape &s = a.shape;
    parallel_for(panels_of(s), max_threads(), [&](int64_t begin, int64_t end, int) {
        for (int64_t panel = begin; panel < end; ++panel) {
            const Columns columns(s, panel);
            for (const bool is_left : {true, false}) {
                const int64_t column = is_left ? columns.left : columns.right;
                const int64_t there = at_most(kHalfPanel, (is_left ? columns.left_end : columns.right_end) - column);
                float *to = a.packed + panel * kPanel * s.depth + (is_left ? 0 : kHalfPanel);
                if (there > 0)
                    pack_tile(a.weight + column * a.row_stride, a.row_stride, there, s.depth, to, kPanel);
                for (int64_t k = 0; k < s.depth; ++k)
                    for (int64_t lane = std::max<int64_t>(there, 0); lane < kHalfPanel; ++lane)
                        to[k * kPanel + lane] = 0.0f;
            }
        }
    });
}

void linear(const Linear &a) {
    const LinearShape &s = a.shape;
    const int64_t columns = panels_of(s), products = a.rows * s.depth * columns * kPanel;
    const int threads = products < kSerialProducts ? 1 : max_threads();
    // rows among the threads as far as they go, then columns
    const int64_t row_parts = at_most(ceil_div(a.rows, 2 * kTileRows), threads);
    const int64_t column_parts = at_most(threads / row_parts, columns);
    const int64_t depths = s.gated || a.gelu ? 1 : ceil_div(s.depth, kMostDepth), deepest = ceil_div(s.depth, depths);
    const int64_t fits = kTilesBytes / static_cast<int64_t>(sizeof(float)) / deepest;
    const int64_t block = at_most(a.rows, std::max<int64_t>(kTileRows, fits));
    parallel_for(row_parts * column_parts, threads, [&](int64_t begin, int64_t end, int) {
        float *tiles = scratch(block * deepest);
        for (int64_t part = begin; part < end; ++part) {
            const int64_t i = part / column_parts, j = part % column_parts;
            const int64_t last = (i + 1) * a.rows / row_parts;
            for (int64_t row = i * a.rows / row_parts; row < last; row += block)
                for (int64_t k = 0; k < s.depth; k += deepest)
                    multiply_rows(a, row, at_most(block, last - row), j * columns / column_parts,
                                  (j + 1) * columns / column_parts, {k, at_most(deepest, s.depth - k)}, tiles);
        }
    });
}

} // namespace KOLORS_FAST_ISA
} // namespace kolors_fast
