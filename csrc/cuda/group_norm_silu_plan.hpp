// How GroupNorm+SiLU is cut into thread blocks: pure functions of shape, layout, vector width and SM count.
//
// One block per (sample, group) leaves half of a large GPU idle at batch 2 with 32 groups, so both layouts also
// cut the positions (hw) into chunks. Each chunk leaves partial results in the workspace, which are merged in
// a fixed order.
#pragma once

#include "common/arguments.h"
#include "common/division.h"

#include <algorithm>
#include <cstdint>
#include <numeric>

namespace kolors_fast {

constexpr int kThreads = 256;
// blocks that fit one SM at the register counts which the launch bounds allow
constexpr int kForwardResidency = 4;
constexpr int kBackwardResidency = 2;
// positions (height times width) are counted in 32 bits, offsets in 64
constexpr int64_t kMaxPositions = int64_t{1} << 30;
constexpr int kLargeDevice = 160; // multiprocessors
constexpr int kMaxSliceGroups = 64;
// Up to this many partials per group the applying blocks merge for themselves: four loads per lane, less than the
// gap between two launches. Above it one small kernel merges once.
constexpr int64_t kMergeInPlace = 128;
// at least this many vectors of one position side by side: 128 bytes of 16-byte ones, or 32 single elements
constexpr int kSliceVectors = 8;
constexpr int kSliceScalars = 32;

// channels_last: a block owns `rows` positions of a slice of channels, threads laid out [row_lanes][columns].
// channels first: a warp owns `rows` positions of one channel plane.
struct GroupNormPlan {
    int64_t blocks;
    int rows;   // positions per chunk; the last may be shorter
    int chunks; // pieces of hw
    int slices; // channel slices of one sample (planes: channels)
    int slice_channels;
    int slice_groups;
    // partials of a group are [parts][chunks]; a part is a run of part_channels channels (the last may be shorter)
    int parts;
    int part_channels;
    int columns;
    int row_lanes;
    int threads;
    int vector;

    int64_t partials_per_group() const { return int64_t{parts} * chunks; }
};

// Can a block of channels_last threads own whole groups or a vector-aligned part of one?
inline bool slices_fit(int64_t per_group, int vector) {
    return per_group % vector == 0 || std::lcm(per_group, int64_t{vector}) / vector <= kThreads;
}

inline void cut_positions(GroupNormPlan &p, const GroupNormSiluShape &s, int64_t chunks, int64_t multiple) {
    p.rows = static_cast<int>(round_up(ceil_div(s.hw, chunks), multiple));
    p.chunks = static_cast<int>(ceil_div(s.hw, p.rows));
}

inline GroupNormPlan plan_channels_last(const GroupNormSiluShape &s, int vector, int64_t resident) {
    const int64_t per_group = s.group_channels();
    GroupNormPlan p{};
    p.vector = vector;
    p.parts = 1;
    p.part_channels = static_cast<int>(per_group);
    // the smallest run of whole groups that ends on a vector boundary
    const int64_t unit = std::lcm(per_group, int64_t{vector});
    if (unit / vector > kThreads) {
        const int64_t vectors = per_group / vector;
        p.part_channels = static_cast<int>(ceil_div(vectors, ceil_div(vectors, kThreads)) * vector);
        p.parts = static_cast<int>(ceil_div(per_group, p.part_channels));
        p.slice_channels = p.part_channels;
        p.slice_groups = 1;
        p.slices = static_cast<int>(s.groups * p.parts);
    } else {
        const int64_t units = s.channels() / unit;
        const int64_t wanted = vector == 1 ? kSliceScalars : kSliceVectors;
        int64_t k = ceil_div(wanted * vector, unit); // units per slice: as few as are wide enough
        k = std::min({k, units, kThreads * vector / unit, kMaxSliceGroups * per_group / unit});
        k = ceil_div(units, ceil_div(units, k)); // evened out; the last slice may be narrower
        p.slice_channels = static_cast<int>(k * unit);
        p.slice_groups = static_cast<int>(p.slice_channels / per_group);
        p.slices = static_cast<int>(ceil_div(units, k));
    }
    p.columns = p.slice_channels / vector;
    p.row_lanes = std::max(1, kThreads / p.columns);
    p.threads = static_cast<int>(round_up(p.columns * p.row_lanes, 32));
    const int64_t most = std::max<int64_t>(1, s.hw / (2 * p.row_lanes)); // two rows per thread or more
    cut_positions(p, s, std::clamp<int64_t>(resident / (s.n * p.slices), 1, most), 1);
    p.blocks = s.n * p.slices * p.chunks;
    return p;
}

inline GroupNormPlan plan_planes(const GroupNormSiluShape &s, int vector, int64_t resident) {
    GroupNormPlan p{};
    p.vector = vector;
    p.threads = kThreads;
    p.slices = static_cast<int>(s.channels());
    p.slice_channels = 1;
    p.slice_groups = 1;
    p.parts = static_cast<int>(s.group_channels());
    p.part_channels = 1;
    p.columns = 32;
    p.row_lanes = kThreads / 32;                 // warps, each on its own
    const int64_t stride = int64_t{32} * vector; // a multiple of it keeps every chunk aligned
    const int64_t most = std::max<int64_t>(1, s.hw / (2 * stride));
    cut_positions(p, s, std::clamp<int64_t>(resident * p.row_lanes / (s.n * p.slices), 1, most), stride);
    p.blocks = ceil_div(s.n * p.slices * p.chunks, p.row_lanes);
    return p;
}

inline GroupNormPlan group_norm_plan(const GroupNormSiluShape &s, int vector, bool backward, int multiprocessors) {
    const int64_t resident = int64_t{multiprocessors} * (backward ? kBackwardResidency : kForwardResidency);
    return s.channels_last ? plan_channels_last(s, vector, resident) : plan_planes(s, vector, resident);
}

// Floats of workspace for one plan. Forward: (mean, sum of squared deviations) per partial. Backward: three sums per
// (sample, chunk, channel), their totals per (sample, channel), and two means per (sample, group).
inline int64_t workspace_floats(const GroupNormSiluShape &s, const GroupNormPlan &p, bool backward) {
    if (!backward)
        return 2 * s.n * s.groups * p.partials_per_group();
    return 3 * s.n * s.channels() * (p.chunks + 1) + 2 * s.n * s.groups;
}

// The pointers decide the vector width only at the launch, so the workspace is the largest of all widths.
inline int64_t workspace_bytes(const GroupNormSiluShape &s, bool backward, int multiprocessors) {
    if (s.n <= 0 || s.hw <= 0 || s.groups <= 0 || s.channels() <= 0)
        return 0;
    int64_t floats = 0;
    for (const int vector : {1, 4, 8}) {
        const bool possible =
            s.channels_last ? s.channels() % vector == 0 && slices_fit(s.group_channels(), vector) : s.hw % vector == 0;
        if (!possible)
            continue;
        const GroupNormPlan p = group_norm_plan(s, vector, backward, multiprocessors);
        floats = std::max(floats, workspace_floats(s, p, backward));
    }
    return floats * static_cast<int64_t>(sizeof(float));
}

} // namespace kolors_fast
