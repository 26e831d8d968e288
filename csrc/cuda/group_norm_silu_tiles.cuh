// What a block or a warp of the GroupNorm+SiLU kernels owns, and how a block brings its threads together.
#pragma once

#include "cuda/common.cuh"
#include "cuda/group_norm_silu_plan.hpp"

namespace kolors_fast {

// What a channels_last block owns: positions [row_begin, row_end) of channels [channel, channel + channels).
struct Tile {
    int64_t n;
    int row_begin, row_end;
    int chunk;
    int channel, channels;
    int group, groups; // the first one and how many
    int part;
};

__device__ __forceinline__ Tile tile_of(const GroupNormSiluShape &s, const GroupNormPlan &p) {
    Tile t;
    // slices run fastest, so that blocks at work together read whole rows
    const unsigned slice = blockIdx.x % p.slices;
    const unsigned rest = blockIdx.x / p.slices;
    t.chunk = rest % p.chunks;
    t.n = rest / p.chunks;
    t.row_begin = t.chunk * p.rows;
    t.row_end = min(t.row_begin + p.rows, static_cast<int>(s.hw));
    const int all = static_cast<int>(s.c + s.c_skip);
    const int per_group = all / static_cast<int>(s.groups);
    int end;
    if (p.parts == 1) {
        t.group = slice * p.slice_groups;
        t.part = 0;
        t.channel = slice * p.slice_channels;
        end = min(t.channel + p.slice_channels, all);
        t.groups = (end - t.channel) / per_group;
    } else {
        t.group = slice / p.parts;
        t.part = slice % p.parts;
        t.channel = t.group * per_group + t.part * p.part_channels;
        end = min(t.channel + p.part_channels, (t.group + 1) * per_group);
        t.groups = 1;
    }
    t.channels = end - t.channel;
    return t;
}

// A thread's place in a tile: every row_lanes-th position of V channels.
template <int V> struct Place {
    int lane, column;
    int channel; // within the tile
    bool active;

    __device__ __forceinline__ Place(const Tile &t, const GroupNormPlan &p)
        : lane(threadIdx.x / p.columns), column(threadIdx.x % p.columns), channel(column * V),
          active(lane < p.row_lanes && channel < t.channels) {}
};

// pointer to (n, position 0, channel) and the step from one position to the next
template <typename T> struct Column {
    T *base;
    int stride;

    __device__ __forceinline__ T *at(int position) const { return base + static_cast<int64_t>(position) * stride; }
};

// The two inputs (or their gradients) as one tensor of c + c_skip channels.
template <typename T>
__device__ __forceinline__ Column<T> column_of(T *x, T *skip, const GroupNormSiluShape &s, int64_t n, int64_t channel) {
    if (channel < s.c)
        return {x + n * s.hw * s.c + channel, static_cast<int>(s.c)};
    return {skip + n * s.hw * s.c_skip + channel - s.c, static_cast<int>(s.c_skip)};
}

template <typename T>
__device__ __forceinline__ T *plane_of(T *x, T *skip, const GroupNormSiluShape &s, int64_t n, int64_t channel) {
    return channel < s.c ? x + (n * s.c + channel) * s.hw : skip + (n * s.c_skip + channel - s.c) * s.hw;
}

// What a warp owns of channels-first data: positions [begin, end) of one plane.
struct Segment {
    int64_t n;
    int channel;
    int chunk;
    int begin, end;
    bool valid;
};

__device__ __forceinline__ Segment segment_of(const GroupNormSiluShape &s, const GroupNormPlan &p) {
    const unsigned warp = blockIdx.x * (kThreads / kWarp) + threadIdx.x / kWarp;
    const unsigned plane = warp / p.chunks;
    Segment g;
    g.chunk = warp % p.chunks;
    g.channel = plane % p.slices;
    g.n = plane / p.slices;
    g.begin = g.chunk * p.rows;
    g.end = min(g.begin + p.rows, static_cast<int>(s.hw));
    g.valid = g.n < s.n;
    return g;
}

// Halves the row lanes of a block until one is left: save(slot) puts a thread's values into shared memory, take(slot)
// merges them into those of the thread that keeps the slot. Slots are below kThreads.
template <int V, typename Save, typename Take>
__device__ __forceinline__ void merge_row_lanes(const GroupNormPlan &p, const Place<V> &place, Save save, Take take) {
    int half = 1;
    while (half < p.row_lanes)
        half *= 2;
    for (half /= 2; half > 0; half /= 2) {
        if (place.active && place.lane >= half && place.lane < 2 * half)
            save((place.lane - half) * p.columns + place.column);
        __syncthreads();
        if (place.active && place.lane < half && place.lane + half < p.row_lanes)
            take(place.lane * p.columns + place.column);
        __syncthreads();
    }
}

// V neighbours from shared memory, in 16-byte words where V allows
template <int V> __device__ __forceinline__ void read_shared(const float *shared, float (&v)[V]) {
    constexpr int kWide = V % 4 == 0 ? 4 : 1;
#pragma unroll
    for (int i = 0; i < V; i += kWide) {
        const Pack<float, kWide> pack = load<float, kWide>(shared + i);
#pragma unroll
        for (int j = 0; j < kWide; ++j)
            v[i + j] = pack.get(j);
    }
}

} // namespace kolors_fast
