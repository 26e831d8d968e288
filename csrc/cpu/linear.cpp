// y = x w^T + bias + add, or with the columns of w in two halves value and gate, y = value * gelu(gate).
#include "gauss.h"
#include "isa.h"
#include "parallel.h"
#include "product.h"

namespace kolors_fast {
namespace KOLORS_FAST_ISA {
namespace {

constexpr int64_t kSerialProducts = 1 << 17; // below this a second thread costs more than it saves

// The columns of w in the left and the right half of a panel: those from left and right on, up to the ends.
struct Columns {
    int64_t left, right, left_end, right_end;

    Columns(const LinearShape &s, int64_t panel)
        : left(panel * (s.gated ? kHalfPanel : kPanel)), right(left + (s.gated ? s.width : kHalfPanel)),
          left_end(s.width), right_end(s.gated ? 2 * s.width : s.width) {}
};

int64_t panels_of(const LinearShape &s) { return ceil_div(s.width, s.gated ? kHalfPanel : kPanel); }

// One tile by one panel, `row` the tile's first.
template <int kRows> KOLORS_FAST_INLINE void multiply_and_store(const Linear &a, int64_t row, const float *tile,
                                                                int64_t panel, const float *ahead) {
    const LinearShape &s = a.shape;
    const Columns columns(s, panel);
    for (int at = 0; at < kHalfPanel; at += kWidth) {
        const int64_t left = columns.left + at, right = columns.right + at;
        Floats sums[2 * kRows];
        multiply(tile, a.packed + panel * kPanel * s.depth + at, ahead, s.depth,
                 load_columns(a.bias, left, columns.left_end), load_columns(a.bias, right, columns.right_end), sums,
                 std::make_integer_sequence<int, kRows>{});
        for (int r = 0; r < kRows; ++r) {
            float *y = a.y + (row + r) * s.width;
            if (a.add) {
                const float *add = a.add + (row + r) * s.width;
                sums[2 * r] += load_columns(add, left, columns.left_end);
                sums[2 * r + 1] += load_columns(add, right, columns.right_end);
            }
            if (s.gated) {
                const Floats gate = sums[2 * r + 1];
                store_columns(y, sums[2 * r] * (gate * gauss(gate, float{}).cdf), left, columns.left_end);
            } else {
                store_columns(y, sums[2 * r], left, columns.left_end);
                store_columns(y, sums[2 * r + 1], right, columns.right_end);
            }
        }
    }
}

// All rows [first, first + count) by the panels [begin, end).
void multiply_rows(const Linear &a, int64_t first, int64_t count, int64_t begin, int64_t end, float *tiles) {
    const int64_t depth = a.shape.depth;
    const Tiles cut(count);
    for (int64_t t = 0; t < cut.count; ++t)
        pack_tile(a.x + (first + cut.first(t)) * a.row_stride, a.row_stride, cut.first(t + 1) - cut.first(t), depth,
                  tiles + cut.first(t) * depth);
    const int64_t group = std::max<int64_t>(1, kPanelsBytes / (kPanel * sizeof(float) * depth));
    for (int64_t first_panel = begin; first_panel < end; first_panel += group) {
        const int64_t count = at_most(group, end - first_panel);
        const float *ahead = a.packed + (first_panel + count) * kPanel * depth;
        int64_t fetched = 0;
        for (int64_t t = 0; t < cut.count; ++t)
            for_tile_rows(cut.first(t + 1) - cut.first(t), [&](auto rows) {
                for (int64_t panel = first_panel; panel < first_panel + count; ++panel) {
                    multiply_and_store<rows.value>(a, first + cut.first(t), tiles + cut.first(t) * depth, panel, ahead);
                    if (fetched++ < 2 * count)
                        ahead += kLine * depth;
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
            for (int lane = 0; lane < kPanel; ++lane) {
                const bool is_left = lane < kHalfPanel;
                const int64_t column = is_left ? columns.left + lane : columns.right + lane - kHalfPanel;
                const bool there = column < (is_left ? columns.left_end : columns.right_end);
                float *to = a.packed + panel * kPanel * s.depth + lane;
                for (int64_t k = 0; k < s.depth; ++k)
                    to[k * kPanel] = there ? a.weight[column * a.row_stride + k] : 0.0f;
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
    const int64_t block = at_most(a.rows, std::max<int64_t>(kTileRows, kTilesBytes / sizeof(float) / s.depth));
    parallel_for(row_parts * column_parts, threads, [&](int64_t begin, int64_t end, int) {
        float *tiles = scratch(block * s.depth);
        for (int64_t part = begin; part < end; ++part) {
            const int64_t i = part / column_parts, j = part % column_parts;
            const int64_t last = (i + 1) * a.rows / row_parts;
            for (int64_t row = i * a.rows / row_parts; row < last; row += block)
                multiply_rows(a, row, at_most(block, last - row), j * columns / column_parts,
                              (j + 1) * columns / column_parts, tiles);
        }
    });
}

} // namespace KOLORS_FAST_ISA
} // namespace kolors_fast
