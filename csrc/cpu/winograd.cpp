// 3x3 convolution of stride 1 and padding 1 on channels_last maps at 4/9 of its products: Winograd's F(2x2, 3x3).
//
// Each 2x2 patch of the output reads a 4x4 window d of the input: y = A^T ((G g G^T) * (B^T d B)) A, where * is taken
// for each of the 16 positions alone and sums over channels. So the convolution is 16 products of matrices, patches by
// channels (Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, arXiv 1509.09308). B and A hold 0, 1 and
// -1 only and G besides 1/2: the result is exact up to rounding, of which there is less than in the plain sum from
// about 16 channels on, because each sum is a ninth as long (tests/ops/test_cpu_products.py).
#include "isa.h"
#include "parallel.h"
#include "product.h"

namespace kolors_fast {
namespace KOLORS_FAST_ISA {
namespace {

constexpr int kPositions = 16;
// Of transformed windows at a time: half of a second-level cache of 1 MB, but enough tiles for a panel that comes from
// memory. With one tile, 1280 channels on 8x8 took 12.1 ms; with two or more 8.2 to 8.9 (2 cores of an AMD EPYC).
constexpr int64_t kWindowsBytes = 1 << 19, kLeastTiles = 4;

// The 2x2 patches of all samples, row by row.
struct Patches {
    int64_t height, width, down, across, count;

    explicit Patches(const WinogradShape &s)
        : height(s.height), width(s.width), down(ceil_div(height, 2)), across(ceil_div(width, 2)),
          count(s.batch * down * across) {}

    // Calls body(i, j, pixel) for pixel (i, j) of a window of the given size that begins at the patch's row - margin.
    // pixel is its index among all pixels of the batch, or -1 off the map.
    template <typename Body>
    KOLORS_FAST_INLINE void for_pixels(int64_t patch, int size, int margin, const Body &body) const {
        const int64_t sample = patch / (down * across), row = patch / across % down * 2 - margin,
                      column = patch % across * 2 - margin;
        for (int i = 0; i < size; ++i)
            for (int j = 0; j < size; ++j) {
                const int64_t y = row + i, x = column + j;
                const bool there = y >= 0 && y < height && x >= 0 && x < width;
                body(i, j, there ? (sample * height + y) * width + x : -1);
            }
    }
};

// B^T d along one axis
KOLORS_FAST_INLINE void transform_window(Floats &d0, Floats &d1, Floats &d2, Floats &d3) {
    const Floats a = d0 - d2, b = d1 + d2, c = d2 - d1, d = d1 - d3;
    d0 = a, d1 = b, d2 = c, d3 = d;
}

// B^T d B of one window for a vector of channels, position by position, `stride` apart.
template <typename Vector> KOLORS_FAST_INLINE void
transform_window(const float *const (&pixels)[kPositions], int64_t channel, Vector vector, float *to, int64_t stride) {
    Floats d[4][4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j)
            d[i][j] = vector.load(pixels[4 * i + j] + channel);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)
        transform_window(d[0][j], d[1][j], d[2][j], d[3][j]);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        transform_window(d[i][0], d[i][1], d[i][2], d[i][3]);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j)
            store(to + (4 * i + j) * stride, d[i][j]);
    }
}

// The windows of patches [first, first + rows), as one tile [channels][rows] for each position, `position_stride`
// apart.
void transform_windows(const Winograd &a, const Patches &patches, int64_t first, int64_t rows, const float *zeros,
                       float *tiles, int64_t position_stride) {
    const int64_t channels = a.shape.channels;
    const float *pixels[kTileRows][kPositions];
    for (int64_t r = 0; r < rows; ++r)
        patches.for_pixels(first + r, 4, 1, [&](int i, int j, int64_t pixel) {
            pixels[r][4 * i + j] = pixel < 0 ? zeros : a.x + pixel * channels;
        });
    alignas(64) float transformed[kPositions * kTileRows * kWidth];
    for_vectors(channels, [&](int64_t channel, auto vector) {
        for (int64_t r = 0; r < rows; ++r)
            transform_window(pixels[r], channel, vector, transformed + r * kWidth, rows * kWidth);
        for (int p = 0; p < kPositions; ++p)
            pack_tile(transformed + p * rows * kWidth, kWidth, rows, at_most(kWidth, channels - channel),
                      tiles + p * position_stride + channel * rows);
    });
}

// A^T m along one axis
KOLORS_FAST_INLINE void transform_sums(Floats m0, Floats m1, Floats m2, Floats m3, Floats &y0, Floats &y1) {
    y0 = m0 + m1 + m2;
    y1 = m1 - m2 - m3;
}

// A^T m A + bias of one patch for one vector of output channels.
KOLORS_FAST_INLINE void transform_sums(const Winograd &a, const Patches &patches, int64_t patch, const Floats *sums,
                                       int64_t stride, int64_t first_column) {
    const Floats bias = load_columns(a.bias, first_column, a.shape.out);
    Floats half[2][4], y[2][2];
    for (int j = 0; j < 4; ++j)
        transform_sums(sums[j * stride], sums[(4 + j) * stride], sums[(8 + j) * stride], sums[(12 + j) * stride],
                       half[0][j], half[1][j]);
    for (int i = 0; i < 2; ++i)
        transform_sums(half[i][0], half[i][1], half[i][2], half[i][3], y[i][0], y[i][1]);
    patches.for_pixels(patch, 2, 0, [&](int i, int j, int64_t pixel) {
        if (pixel >= 0)
            store_columns(a.y + pixel * a.shape.out, y[i][j] + bias, first_column, a.shape.out);
    });
}

// Patches [first, first + count) by the panels [begin, end).
void convolve(const Winograd &a, const Patches &patches, int64_t first, int64_t count, int64_t begin, int64_t end,
              const float *zeros, float *tiles, Floats *sums) {
    const int64_t channels = a.shape.channels, panel_floats = kPanel * channels;
    const Tiles cut(count);
    for (int64_t t = 0; t < cut.count; ++t)
        transform_windows(a, patches, first + cut.first(t), cut.first(t + 1) - cut.first(t), zeros,
                          tiles + cut.first(t) * channels, count * channels);
    for (int64_t at = begin * kHalfPanel; at < end * kHalfPanel; at += kWidth) { // of the left halves
        const int64_t panel = at / kHalfPanel, column = panel * kPanel + at % kHalfPanel;
        for (int p = 0; p < kPositions; ++p) {
            const float *weight = a.packed + (panel * kPositions + p) * panel_floats + at % kHalfPanel;
            for (int64_t t = 0; t < cut.count; ++t)
                for_tile_rows(cut.first(t + 1) - cut.first(t), [&](auto rows) {
                    multiply(tiles + (p * count + cut.first(t)) * channels, weight,
                             weight + panel_floats + at_most(t, 1) * kLine * channels, channels, Floats{}, Floats{},
                             sums + 2 * (p * count + cut.first(t)), std::make_integer_sequence<int, rows.value>{});
                });
        }
        for (int64_t r = 0; r < count; ++r)
            for (int vector = 0; vector < 2; ++vector)
                transform_sums(a, patches, first + r, sums + 2 * r + vector, 2 * count, column + vector * kHalfPanel);
    }
}

// G g G^T of one channel for one output channel; zeros beyond the last.
KOLORS_FAST_INLINE void pack_weight(const PackWinograd &a, int64_t panel, int64_t lane, int64_t channel) {
    const WinogradShape &s = a.shape;
    const int64_t o = panel * kPanel + lane;
    double half[4][3] = {}; // G g
    for (int j = 0; j < 3 && o < s.out; ++j) {
        const float *g = a.weight + (o * 9 + j) * s.channels + channel; // [out, 3, 3, channels]
        const double top = g[0], middle = g[3 * s.channels], bottom = g[6 * s.channels];
        half[0][j] = top;
        half[1][j] = 0.5 * (top + middle + bottom);
        half[2][j] = 0.5 * (top - middle + bottom);
        half[3][j] = bottom;
    }
    float *to = a.packed + (panel * kPositions * s.channels + channel) * kPanel + lane;
    for (int i = 0; i < 4; ++i) {
        const double *h = half[i];
        const double u[4] = {h[0], 0.5 * (h[0] + h[1] + h[2]), 0.5 * (h[0] - h[1] + h[2]), h[2]};
        for (int j = 0; j < 4; ++j)
            to[(4 * i + j) * s.channels * kPanel] = static_cast<float>(u[j]);
    }
}

} // namespace

void pack_winograd(const PackWinograd &a) {
    const WinogradShape &s = a.shape;
    parallel_for(panels(s.out) * s.channels, max_threads(), [&](int64_t begin, int64_t end, int) {
        for (int64_t i = begin; i < end; ++i)
            for (int lane = 0; lane < kPanel; ++lane)
                pack_weight(a, i / s.channels, lane, i % s.channels);
    });
}

void winograd(const Winograd &a) {
    const WinogradShape &s = a.shape;
    const Patches patches(s);
    const int64_t columns = panels(s.out);
    const int threads = max_threads();
    // patches among the threads as far as they go, then output channels
    const int64_t row_parts = at_most(ceil_div(patches.count, kTileRows), threads);
    const int64_t column_parts = at_most(threads / row_parts, columns);
    const int64_t of_tile = kPositions * kTileRows * s.channels * static_cast<int64_t>(sizeof(float));
    const int64_t block =
        at_most(ceil_div(patches.count, row_parts), kTileRows * std::max(kLeastTiles, kWindowsBytes / of_tile));
    parallel_for(row_parts * column_parts, threads, [&](int64_t begin, int64_t end, int) {
        const int64_t windows = kPositions * block * s.channels, sums = 2 * kPositions * block;
        float *memory = scratch(windows + sums * kWidth + padded(s.channels));
        Floats *summed = reinterpret_cast<Floats *>(memory);
        float *tiles = memory + sums * kWidth, *zeros = tiles + windows;
        std::fill(zeros, zeros + s.channels, 0.0f);
        for (int64_t part = begin; part < end; ++part) {
            const int64_t i = part / column_parts, j = part % column_parts;
            const int64_t last = (i + 1) * patches.count / row_parts;
            for (int64_t patch = i * patches.count / row_parts; patch < last; patch += block)
                convolve(a, patches, patch, at_most(block, last - patch), j * columns / column_parts,
                         (j + 1) * columns / column_parts, zeros, tiles, summed);
        }
    });
}

} // namespace KOLORS_FAST_ISA
} // namespace kolors_fast
