// What both directions of group_norm_silu share: the fixed partition of the work, the order of the passes, the tables.
//
// The work is cut into units whose statistics belong together and units into blocks, by the shape alone. Each block
// leaves partial sums, which are added in order. So the result does not depend on the number of threads.
#pragma once

#include "../common/arguments.h"
#include "parallel.h"
#include "simd.h"
#include "tables.h"

#include <type_traits>

namespace kolors_fast {
namespace KOLORS_FAST_ISA {
namespace {

constexpr int64_t kBlockElements = 1 << 16; // of channels_last: few enough to share one sample among threads
constexpr int64_t kBlockRows = 256;         // bounds the rounding error of the sums
constexpr int kRowsAtOnce = 4;              // more are fewer trips of the sums through memory
constexpr int64_t kPrefetchBytes = 1 << 9;
constexpr int64_t kPrefetchRowsBytes = 1 << 14;
constexpr int64_t kRunElements = 1 << 13;    // of one channel, for both reasons
constexpr int64_t kSerialElements = 1 << 14; // below this a second thread costs more than it saves

// The channels of x or of skip. Tables of per-channel values hold each part padded to whole vectors, from its slot on.
template <typename T> struct Part {
    const T *data;         // [n, channels, hw] or [n, hw, channels]
    int64_t channels;      // of this tensor
    int64_t first_channel; // in the concatenation
    int64_t slot;
};

template <typename T> struct Layout {
    GroupNormSiluShape shape;
    Part<T> parts[2];
    int64_t slots; // length of a table

    Layout(const GroupNormSiluShape &s, const void *x, const void *skip)
        : shape(s),
          parts{{static_cast<const T *>(x), s.c, 0, 0}, {static_cast<const T *>(skip), s.c_skip, s.c, padded(s.c)}},
          slots(padded(s.c) + padded(s.c_skip)) {
        if (s.hw == 1)
            shape.channels_last = true; // the same memory, and whole vectors of it
    }

    const Part<T> &part_of(int64_t channel) const { return parts[channel >= shape.c]; }

    int64_t slot_of(int64_t channel) const {
        const Part<T> &part = part_of(channel);
        return part.slot + channel - part.first_channel;
    }

    int64_t elements() const { return shape.n * shape.channels() * shape.hw; }
    double group_elements() const { return static_cast<double>(shape.group_channels()) * shape.hw; }

    // channels_last: a unit is a sample, a block some of its rows of [hw, C].
    // else: a unit is a (sample, group), a block a run of one of its channels.
    int64_t units() const { return shape.channels_last ? shape.n : shape.n * shape.groups; }
    int64_t block_rows() const {
        const int64_t rows = kBlockElements / shape.channels() / 4 * 4;
        return rows < 8 ? 8 : at_most(rows, kBlockRows);
    }
    int64_t runs() const { return ceil_div(shape.hw, kRunElements); }
    int64_t blocks() const {
        return shape.channels_last ? ceil_div(shape.hw, block_rows()) : shape.group_channels() * runs();
    }

    int threads() const { return elements() < kSerialElements ? 1 : max_threads(); }
};

// Rows [first, first + count) of one sample.
struct Rows {
    int64_t n, first, count;

    template <typename T> Rows(const Layout<T> &layout, int64_t unit, int64_t block) : n(unit) {
        first = block * layout.block_rows();
        count = at_most(layout.block_rows(), layout.shape.hw - first);
    }

    int64_t offset(int64_t hw, int64_t channels) const { return (n * hw + first) * channels; }
};

// Calls body(row, number of rows as a constant) for each kRowsAtOnce rows, then for each of the rest.
template <typename Body> KOLORS_FAST_INLINE void for_rows(int64_t count, const Body &body) {
    int64_t row = 0;
    for (; row + kRowsAtOnce <= count; row += kRowsAtOnce)
        body(row, std::integral_constant<int, kRowsAtOnce>{});
    for (; row < count; ++row)
        body(row, std::integral_constant<int, 1>{});
}

// For who reads, or writes, rows one after the other.
template <bool kWrite = false, typename T> KOLORS_FAST_INLINE void prefetch(const T *at) {
    __builtin_prefetch(reinterpret_cast<const char *>(at) + kPrefetchBytes, kWrite);
}

// For who reads kRows rows at a time and is at the i-th column: fetches in the order of the memory all the same. To the
// hardware's prefetchers short rows side by side look like no stream: 12 instead of 26 GB/s for four rows of 320
// floats.
template <int kRows, typename T> KOLORS_FAST_INLINE void prefetch_rows(const T *rows, int64_t i) {
    const char *ahead = reinterpret_cast<const char *>(rows + kRows * i) + kPrefetchRowsBytes;
    for (size_t line = 0; line < kRows * kWidth * sizeof(T); line += 64)
        __builtin_prefetch(ahead + line, 0, 2);
}

// Part of one channel of one sample: count contiguous elements.
struct Run {
    int64_t n, group, channel, first, count;

    template <typename T> Run(const Layout<T> &layout, int64_t unit, int64_t block) {
        const GroupNormSiluShape &s = layout.shape;
        n = unit / s.groups;
        group = unit % s.groups;
        channel = group * s.group_channels() + block / layout.runs();
        first = block % layout.runs() * kRunElements;
        count = at_most(kRunElements, s.hw - first);
    }

    int64_t offset(int64_t hw, int64_t channels, int64_t first_channel) const {
        return (n * channels + channel - first_channel) * hw + first;
    }
};

// Runs prepare(unit), first(unit, block) on all blocks, finish(unit), second(unit, block).
// Many units: one thread does all of a unit, which may stay in its cache. Few: all threads share each unit's blocks.
// The second pass goes forwards as well: backwards, to meet first what the first pass saw last, was up to a tenth
// slower on a Zen 4 and never faster. Of channels_last, slabs of some groups that fit into the second-level cache, for
// the second pass to read there, were 0.3 to 0.8 times as fast: short pieces of memory, one to a page.
template <typename Passes> void run_passes(int64_t units, int64_t blocks, int threads, const Passes &p) {
    if (threads == 1 || units % threads == 0 || units >= 4 * threads) {
        parallel_for(units, threads, [&](int64_t begin, int64_t end, int) {
            for (int64_t unit = begin; unit < end; ++unit) {
                p.prepare(unit);
                for (int64_t block = 0; block < blocks; ++block)
                    p.first(unit, block);
                p.finish(unit);
                for (int64_t block = 0; block < blocks; ++block)
                    p.second(unit, block);
            }
        });
        return;
    }
    for (int64_t unit = 0; unit < units; ++unit)
        p.prepare(unit);
    parallel_for(units * blocks, threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t i = begin; i < end; ++i)
            p.first(i / blocks, i % blocks);
    });
    parallel_for(units, threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t unit = begin; unit < end; ++unit)
            p.finish(unit);
    });
    parallel_for(units * blocks, threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t i = begin; i < end; ++i)
            p.second(i / blocks, i % blocks);
    });
}

// weight or bias [C] as an fp32 table; absent ones are filled.
template <typename T>
void fill_table(const Layout<T> &layout, const void *values, float absent, float *table /* [slots] */) {
    for (int64_t channel = 0; channel < layout.shape.channels(); ++channel)
        table[layout.slot_of(channel)] = values ? read_scalar(values, channel, layout.shape.weight_dtype) : absent;
}

} // namespace
} // namespace KOLORS_FAST_ISA
} // namespace kolors_fast
