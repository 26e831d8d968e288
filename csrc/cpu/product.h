// Products of fp32 matrices, x [rows, depth] times w^T, for w [width, depth] that was packed once.
//
// w lies in panels of columns, [width / kPanel][depth][kPanel], so that a product reads it as one stream. A vector of a
// panel's left half goes together with its neighbour in the right half: a gated product finds values in one and their
// gates in the other. Some rows of x are brought into tiles [depth][rows of the tile], which stay in the second-level
// cache while all panels pass. The inner loop keeps one tile times two vectors of a panel in registers over the depth.
// The scheme is that of Goto and van de Geijn, Anatomy of High-Performance Matrix Multiplication, 2008.
#pragma once

#include "simd.h"
#include "tables.h"

#include <algorithm>
#include <utility>

#if defined(__SSE__)
#include <immintrin.h>
#endif

namespace kolors_fast {
namespace KOLORS_FAST_ISA {
namespace {

constexpr int kPanel = 32, kHalfPanel = kPanel / 2; // whatever the instruction set: Python allocates panels
#if defined(__AVX512F__)
constexpr int kTileRows = 13; // 26 of 32 registers add up, 3 hold factors
#else
constexpr int kTileRows = 6; // 12 of 16
#endif
constexpr int kLine = 64 / sizeof(float);
// Terms that are added one after the other. Of n normal terms, in chains of m whose sums are added in turn, the
// rounding errors have a variance of (m + n / m) / 2 roundings: least for m = sqrt(n).
constexpr int64_t kChain = 64;

KOLORS_FAST_INLINE int64_t panels(int64_t width) { return ceil_div(width, kPanel); }

// How rows divide into tiles of nearly the same size: a last tile of one row would take as long as half a full one.
struct Tiles {
    int64_t rows, count;

    explicit Tiles(int64_t rows) : rows(rows), count(ceil_div(rows, kTileRows)) {}
    int64_t first(int64_t tile) const { return tile * rows / count; }
};

// rows x depth of x, `stride` apart, as [depth][rows], or into the first columns of rows that are `width` long.
KOLORS_FAST_INLINE void pack_tile(const float *x, int64_t stride, int64_t rows, int64_t depth, float *tile,
                                  int64_t width = 0) {
    width = width ? width : rows;
    int64_t done = 0;
#if defined(__SSE__)
    if (rows >= 4)
        for (; done + 4 <= depth; done += 4)
            for (int64_t row = 0; row < rows; row += 4) {
                const int64_t r = at_most(row, rows - 4); // the last four may be some of those before
                const float *from = x + r * stride + done;
                __m128 a = _mm_loadu_ps(from), b = _mm_loadu_ps(from + stride);
                __m128 c = _mm_loadu_ps(from + 2 * stride), d = _mm_loadu_ps(from + 3 * stride);
                _MM_TRANSPOSE4_PS(a, b, c, d);
                float *to = tile + done * width + r;
                _mm_storeu_ps(to, a);
                _mm_storeu_ps(to + width, b);
                _mm_storeu_ps(to + 2 * width, c);
                _mm_storeu_ps(to + 3 * width, d);
            }
#endif
    for (int64_t k = done; k < depth; ++k)
        for (int64_t r = 0; r < rows; ++r)
            tile[k * width + r] = x[r * stride + k];
}

// One tile by one panel: sums[2 r] and sums[2 r + 1] are added to left and right. Meanwhile what follows `ahead` is
// fetched, a line for each step of the depth. A fold writes the rows out, for registers hold only what constants index.
template <int... kRow> KOLORS_FAST_INLINE void multiply(const float *tile, const float *panel, const float *ahead,
                                                        int64_t depth, Floats left, Floats right, Floats *sums,
                                                        std::integer_sequence<int, kRow...>) {
    for (int64_t done = 0; done == 0 || done < depth; done += kChain) {
        const int64_t count = at_most(depth - done, kChain);
        Floats of[sizeof...(kRow)][2] = {};
        for (int64_t k = 0; k < count; ++k, tile += sizeof...(kRow), panel += kPanel, ahead += kLine) {
            __builtin_prefetch(ahead, 0, 2);
            const Floats b0 = load(panel), b1 = load(panel + kHalfPanel);
            ((of[kRow][0] += tile[kRow] * b0, of[kRow][1] += tile[kRow] * b1), ...);
        }
        if (done == 0)
            ((sums[2 * kRow] = left + of[kRow][0], sums[2 * kRow + 1] = right + of[kRow][1]), ...);
        else
            ((sums[2 * kRow] += of[kRow][0], sums[2 * kRow + 1] += of[kRow][1]), ...);
    }
}

// Calls body with the number of rows as a constant.
template <typename Body, int... kBelow>
KOLORS_FAST_INLINE void for_tile_rows(int64_t rows, const Body &body, std::integer_sequence<int, kBelow...>) {
    (void)((rows == kBelow + 1 ? (body(std::integral_constant<int, kBelow + 1>{}), true) : false) || ...);
}
template <typename Body> KOLORS_FAST_INLINE void for_tile_rows(int64_t rows, const Body &body) {
    for_tile_rows(rows, body, std::make_integer_sequence<int, kTileRows>{});
}

// A vector of the columns [first, end), of which there may be fewer or none.
KOLORS_FAST_INLINE Floats load_columns(const float *bias, int64_t first, int64_t end) {
    if (!bias || first >= end)
        return Floats{};
    return end - first >= kWidth ? load(bias + first) : load_some(bias + first, end - first);
}

KOLORS_FAST_INLINE void store_columns(float *row, Floats value, int64_t first, int64_t end) {
    if (end - first >= kWidth)
        store(row + first, value);
    else if (end > first)
        store_some(row + first, value, end - first);
}

// Memory of this thread, kept for its next call: fresh memory would be paged in each time.
inline float *scratch(int64_t count) {
    static thread_local Workspace<float> kept;
    static thread_local int64_t size = 0;
    if (size < count) {
        kept = workspace<float>(count);
        size = count;
    }
    return kept.get();
}

} // namespace
} // namespace KOLORS_FAST_ISA
} // namespace kolors_fast
