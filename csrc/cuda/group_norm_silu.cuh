// Forward of GroupNorm then SiLU over concat(x, skip) + channel_add, without building the concat.
//
// Two launches read the input twice and write once; the second read finds what the L2 still holds, so it runs
// backwards. Statistics are those of x + channel_add in fp32: exact two-pass moments of a few values at a time,
// merged by Chan's formula, so a large mean does not cancel. No atomics: every sum has one fixed order.
#pragma once

#include "cuda/common.cuh"
#include "cuda/group_norm_silu_plan.hpp"
#include "cuda/group_norm_silu_tiles.cuh"

namespace kolors_fast {

// Loads in flight per thread: 64 bytes, or 8 single elements. Four blocks an SM make that 64 KB; bandwidth times
// latency of an H100 is about 18 KB an SM (3 TB/s x 0.8 us / 132, arithmetic).
template <int V> constexpr int kUnroll = V == 1 ? 8 : 4;

struct ForwardLaunch {
    GroupNormSiluForward call;
    GroupNormPlan plan;
    float2 *partials; // [n, groups, parts, chunks]: mean, sum of squared deviations
    bool merged;      // mean and rstd are there already
};

// Running mean and sum of squared deviations of W neighbours which share one count.
template <int W> struct Moments {
    float mean[W] = {};
    float m2[W] = {};
    float count = 0.0f;

    __device__ __forceinline__ void merge(int j, float other_mean, float other_m2, float share) {
        const float delta = other_mean - mean[j];
        mean[j] += delta * share;
        m2[j] += other_m2 + delta * (delta * (count * share)); // a count of zero must win over a huge delta
    }

    // The first `valid` of B rows, value(u, j) each; the others read as zero. Two passes over the registers.
    template <int B, typename Value> __device__ __forceinline__ void add(int valid, Value value) {
        const float inverse = 1.0f / static_cast<float>(valid);
        const float share = static_cast<float>(valid) / (count + static_cast<float>(valid));
#pragma unroll
        for (int j = 0; j < W; ++j) {
            float sum = 0.0f;
#pragma unroll
            for (int u = 0; u < B; ++u)
                sum += value(u, j);
            const float batch_mean = sum * inverse;
            float squares = 0.0f;
#pragma unroll
            for (int u = 0; u < B; ++u) {
                const float d = u < valid ? value(u, j) - batch_mean : 0.0f;
                squares += d * d;
            }
            merge(j, batch_mean, squares, share);
        }
        count += static_cast<float>(valid);
    }
};

// values behind partial i of a group
__device__ __forceinline__ float partial_count(const GroupNormSiluShape &s, const GroupNormPlan &p, int i) {
    const int chunk = i % p.chunks;
    const int part = i / p.chunks;
    const int per_group = static_cast<int>(s.c + s.c_skip) / static_cast<int>(s.groups);
    const int rows = min(p.rows, static_cast<int>(s.hw) - chunk * p.rows);
    const int channels = min(p.part_channels, per_group - part * p.part_channels);
    return static_cast<float>(rows) * static_cast<float>(channels);
}

// One warp merges the partials of group `index` = n * groups + group; returns (mean, 1 / sqrt(variance + eps)).
__device__ __forceinline__ float2 merge_group(const ForwardLaunch &a, int64_t index) {
    const GroupNormSiluShape &s = a.call.shape;
    const int count = a.plan.parts * a.plan.chunks;
    const float2 *partials = a.partials + index * count;
    const int lane = threadIdx.x % kWarp;
    const float total = static_cast<float>((s.c + s.c_skip) / s.groups * s.hw);
    const float shift = partials[0].x;
    float sum = 0.0f;
    for (int i = lane; i < count; i += kWarp)
        sum += partial_count(s, a.plan, i) * (partials[i].x - shift);
    const float mean = shift + warp_sum(sum) / total;
    float squares = 0.0f;
    for (int i = lane; i < count; i += kWarp) {
        const float d = partials[i].x - mean;
        squares += partials[i].y + partial_count(s, a.plan, i) * (d * d);
    }
    const float variance = warp_sum(squares) / total;
    return make_float2(mean, 1.0f / sqrtf(variance + static_cast<float>(a.call.eps)));
}

// (mean, rstd) of a group; one warp of the whole grid leaves them in the outputs
__device__ __forceinline__ float2 group_statistics(const ForwardLaunch &a, int64_t index, bool keep) {
    if (a.merged)
        return make_float2(a.call.mean[index], a.call.rstd[index]);
    const float2 stats = merge_group(a, index);
    if (keep && threadIdx.x % kWarp == 0) {
        a.call.mean[index] = stats.x;
        a.call.rstd[index] = stats.y;
    }
    return stats;
}

__global__ void __launch_bounds__(kThreads) group_norm_merge(const ForwardLaunch a) {
    const int64_t index = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
    if (index < a.call.shape.n * a.call.shape.groups)
        group_statistics(a, index, true);
}

template <typename T, int V> __device__ __forceinline__ void silu_in_place(float (&v)[V]) {
#pragma unroll
    for (int j = 0; j < V; ++j)
        v[j] *= sigmoid<T>(v[j]);
}

// ---- channels_last ----

template <typename T, int V> __global__ void __launch_bounds__(kThreads, kForwardResidency)
    group_norm_stats_channels_last(const ForwardLaunch a) {
    KF_SHARED(float, shared); // [2 * V + 1][kThreads], then [2][slice_channels]
    constexpr int U = kUnroll<V>;
    const GroupNormSiluShape &s = a.call.shape;
    const GroupNormPlan &p = a.plan;
    const Tile t = tile_of(s, p);
    const Place<V> place(t, p);

    Moments<V> moments;
    if (place.active) {
        const Column<const T> in = column_of(static_cast<const T *>(a.call.x), static_cast<const T *>(a.call.skip), s,
                                             t.n, t.channel + place.channel);
        for (int row = t.row_begin + place.lane; row < t.row_end; row += U * p.row_lanes) {
            Pack<T, V> packs[U] = {};
            int valid = 0;
#pragma unroll
            for (int u = 0; u < U; ++u) {
                const int r = row + u * p.row_lanes;
                if (r < t.row_end) {
                    packs[u] = load<T, V>(in.at(r));
                    ++valid;
                }
            }
            moments.template add<U>(valid, [&](int u, int j) { return packs[u].get(j); });
        }
    }

    const auto save = [&](int slot) {
        shared[slot] = moments.count;
#pragma unroll
        for (int j = 0; j < V; ++j) {
            shared[(1 + j) * kThreads + slot] = moments.mean[j];
            shared[(1 + V + j) * kThreads + slot] = moments.m2[j];
        }
    };
    const auto take = [&](int slot) {
        const float count = shared[slot];
        if (count == 0.0f)
            return;
        const float share = count / (moments.count + count);
#pragma unroll
        for (int j = 0; j < V; ++j) {
            moments.merge(j, shared[(1 + j) * kThreads + slot], shared[(1 + V + j) * kThreads + slot], share);
        }
        moments.count += count;
    };
    merge_row_lanes(p, place, save, take);

    float *const means = shared;
    float *const squares = shared + p.slice_channels;
    if (place.active && place.lane == 0) {
        const int64_t first = t.n * (s.c + s.c_skip) + t.channel + place.channel;
#pragma unroll
        for (int j = 0; j < V; ++j) {
            means[place.channel + j] = moments.mean[j] + load_or_zero<T>(a.call.channel_add, first + j);
            squares[place.channel + j] = moments.m2[j];
        }
    }
    __syncthreads();

    // a warp per group: all its channels have the same count
    const int channels = t.channels / t.groups;
    const float rows = static_cast<float>(t.row_end - t.row_begin);
    for (int g = threadIdx.x / kWarp; g < t.groups; g += blockDim.x / kWarp) {
        const float shift = means[g * channels];
        float sum = 0.0f;
        for (int i = threadIdx.x % kWarp; i < channels; i += kWarp)
            sum += means[g * channels + i] - shift;
        const float mean = shift + warp_sum(sum) / static_cast<float>(channels);
        float m2 = 0.0f;
        for (int i = threadIdx.x % kWarp; i < channels; i += kWarp) {
            const float d = means[g * channels + i] - mean;
            m2 += squares[g * channels + i] + rows * (d * d);
        }
        m2 = warp_sum(m2);
        if (threadIdx.x % kWarp == 0) {
            const int64_t group = t.n * s.groups + t.group + g;
            a.partials[(group * p.parts + t.part) * p.chunks + t.chunk] = make_float2(mean, m2);
        }
    }
}

template <typename T, int V> __global__ void __launch_bounds__(kThreads, kForwardResidency)
    group_norm_apply_channels_last(const ForwardLaunch a) {
    KF_SHARED(float, shared); // [3][slice_channels] center, scale, shift; [2][slice_groups] mean, rstd
    constexpr int U = kUnroll<V>;
    const GroupNormSiluShape &s = a.call.shape;
    const GroupNormPlan &p = a.plan;
    const Tile t = tile_of(s, p);
    const Place<V> place(t, p);
    const int64_t all = s.c + s.c_skip;
    const Column<const T> in = column_of(static_cast<const T *>(a.call.x), static_cast<const T *>(a.call.skip), s, t.n,
                                         t.channel + place.channel);
    const int step = U * p.row_lanes;
    const int first = t.row_begin + place.lane;
    int row = first + (t.row_end - 1 - t.row_begin) / step * step;
    Pack<T, V> packs[U];
    const auto fetch = [&] {
#pragma unroll
        for (int u = 0; u < U; ++u) {
            const int r = row + u * p.row_lanes;
            if (r < t.row_end)
                packs[u] = load<T, V>(in.at(r));
        }
    };
    if (place.active)
        fetch(); // on its way while the statistics are merged

    float *const means = shared + 3 * p.slice_channels;
    float *const rstds = means + p.slice_groups;
    for (int g = threadIdx.x / kWarp; g < t.groups; g += blockDim.x / kWarp) {
        const float2 stats = group_statistics(a, t.n * s.groups + t.group + g, t.chunk == 0 && t.part == 0);
        if (threadIdx.x % kWarp == 0) {
            means[g] = stats.x;
            rstds[g] = stats.y;
        }
    }
    __syncthreads();
    const int per_group = t.channels / t.groups;
    for (int i = threadIdx.x; i < t.channels; i += blockDim.x) {
        const int channel = t.channel + i;
        const int group = i / per_group;
        shared[i] = means[group] - load_or_zero<T>(a.call.channel_add, t.n * all + channel);
        shared[p.slice_channels + i] = rstds[group] * load_any(a.call.weight, channel, s.weight_dtype, 1.0f);
        shared[2 * p.slice_channels + i] = load_any(a.call.bias, channel, s.weight_dtype, 0.0f);
    }
    __syncthreads();
    if (!place.active)
        return;

    float center[V], scale[V], shift[V];
    read_shared(shared + place.channel, center);
    read_shared(shared + p.slice_channels + place.channel, scale);
    read_shared(shared + 2 * p.slice_channels + place.channel, shift);
    T *const out = static_cast<T *>(a.call.y) + t.n * s.hw * all + t.channel + place.channel;
    while (row >= first) {
#pragma unroll
        for (int u = 0; u < U; ++u) {
            const int r = row + u * p.row_lanes;
            if (r < t.row_end) {
                float v[V];
#pragma unroll
                for (int j = 0; j < V; ++j)
                    v[j] = (packs[u].get(j) - center[j]) * scale[j] + shift[j];
                if (s.silu)
                    silu_in_place<T>(v);
                store<T, V>(out + r * all, v);
            }
        }
        row -= step;
        if (row >= first)
            fetch();
    }
}

// ---- channels first: planes ----

template <typename T, int V> __global__ void __launch_bounds__(kThreads, kForwardResidency)
    group_norm_stats_planes(const ForwardLaunch a) {
    constexpr int U = kUnroll<V>;
    const GroupNormSiluShape &s = a.call.shape;
    const GroupNormPlan &p = a.plan;
    const Segment g = segment_of(s, p);
    if (!g.valid)
        return;
    const T *in = plane_of(static_cast<const T *>(a.call.x), static_cast<const T *>(a.call.skip), s, g.n, g.channel);
    const int lane = threadIdx.x % kWarp;
    Moments<1> moments;
    for (int i = g.begin + lane * V; i < g.end; i += U * kWarp * V) {
        Pack<T, V> packs[U] = {};
        int valid = 0;
#pragma unroll
        for (int u = 0; u < U; ++u) {
            const int at = i + u * kWarp * V;
            if (at < g.end) {
                packs[u] = load<T, V>(in + at);
                valid += V;
            }
        }
        moments.add<U * V>(valid, [&](int i, int) { return packs[i / V].get(i % V); });
    }
    // lane 0 always holds values; a lane without any weighs nothing
    const float shift = __shfl_sync(0xffffffffu, moments.mean[0], 0);
    const float count = static_cast<float>(g.end - g.begin);
    const float own = moments.count > 0.0f ? moments.mean[0] : shift;
    const float mean = shift + warp_sum(moments.count * (own - shift)) / count;
    const float d = own - mean;
    const float m2 = warp_sum(moments.m2[0] + moments.count * (d * d));
    if (lane == 0) {
        const int64_t all = s.c + s.c_skip;
        const float added = load_or_zero<T>(a.call.channel_add, g.n * all + g.channel);
        a.partials[(g.n * all + g.channel) * p.chunks + g.chunk] = make_float2(mean + added, m2);
    }
}

template <typename T, int V> __global__ void __launch_bounds__(kThreads, kForwardResidency)
    group_norm_apply_planes(const ForwardLaunch a) {
    constexpr int U = kUnroll<V>;
    const GroupNormSiluShape &s = a.call.shape;
    const GroupNormPlan &p = a.plan;
    const Segment g = segment_of(s, p);
    if (!g.valid)
        return;
    const int64_t group = g.channel / p.parts;
    const bool keep = g.chunk == 0 && g.channel % p.parts == 0;
    const float2 stats = group_statistics(a, g.n * s.groups + group, keep);
    const int64_t all = s.c + s.c_skip;
    const float center = stats.x - load_or_zero<T>(a.call.channel_add, g.n * all + g.channel);
    const float scale = stats.y * load_any(a.call.weight, g.channel, s.weight_dtype, 1.0f);
    const float shift = load_any(a.call.bias, g.channel, s.weight_dtype, 0.0f);

    const T *in = plane_of(static_cast<const T *>(a.call.x), static_cast<const T *>(a.call.skip), s, g.n, g.channel);
    T *const out = static_cast<T *>(a.call.y) + (g.n * all + g.channel) * s.hw;
    constexpr int kStep = U * kWarp * V;
    const int first = g.begin + threadIdx.x % kWarp * V;
    for (int i = first + (g.end - 1 - g.begin) / kStep * kStep; i >= first; i -= kStep) {
        Pack<T, V> packs[U];
#pragma unroll
        for (int u = 0; u < U; ++u) {
            const int at = i + u * kWarp * V;
            if (at < g.end)
                packs[u] = load<T, V>(in + at);
        }
#pragma unroll
        for (int u = 0; u < U; ++u) {
            const int at = i + u * kWarp * V;
            if (at < g.end) {
                float v[V];
#pragma unroll
                for (int j = 0; j < V; ++j)
                    v[j] = (packs[u].get(j) - center) * scale + shift;
                if (s.silu)
                    silu_in_place<T>(v);
                store<T, V>(out + at, v);
            }
        }
    }
}

// ---- launch ----

template <typename T, int V> inline cudaError_t launch_forward(const ForwardLaunch &a, cudaStream_t stream) {
    const GroupNormSiluShape &s = a.call.shape;
    const GroupNormPlan &p = a.plan;
    const dim3 grid(static_cast<unsigned>(p.blocks));
    const dim3 block(p.threads);
    auto stats = group_norm_stats_planes<T, V>;
    auto apply = group_norm_apply_planes<T, V>;
    size_t stats_bytes = 0;
    size_t apply_bytes = 0;
    if (s.channels_last) {
        stats = group_norm_stats_channels_last<T, V>;
        apply = group_norm_apply_channels_last<T, V>;
        stats_bytes = (2 * V + 1) * kThreads * sizeof(float);
        apply_bytes = (3 * p.slice_channels + 2 * p.slice_groups) * sizeof(float);
    }
    KF_LAUNCH(stats, grid, block, stats_bytes, stream, a);
    ForwardLaunch rest = a;
    if (p.partials_per_group() > kMergeInPlace) {
        const dim3 merging(static_cast<unsigned>(ceil_div(s.n * s.groups, kThreads / kWarp)));
        KF_LAUNCH(group_norm_merge, merging, dim3(kThreads), 0, stream, rest);
        rest.merged = true;
    }
    KF_LAUNCH(apply, grid, block, apply_bytes, stream, rest);
    return cudaGetLastError();
}

// 16-byte words where every row, plane and seam starts on one, single elements elsewhere
inline int vector_width(const GroupNormSiluShape &s, bool aligned) {
    const int vector = s.dtype == DType::float32 ? 4 : 8;
    const bool whole = s.channels_last
                           ? s.c % vector == 0 && s.c_skip % vector == 0 && slices_fit(s.group_channels(), vector)
                           : s.hw % vector == 0;
    return aligned && whole ? vector : 1;
}

inline bool valid_shape(const GroupNormSiluShape &s) {
    return s.n >= 0 && s.c >= 0 && s.c_skip >= 0 && s.channels() > 0 && s.hw >= 0 && s.hw < kMaxPositions &&
           s.groups > 0 && s.channels() <= INT32_MAX && s.channels() % s.groups == 0 &&
           is_dtype(static_cast<int>(s.dtype)) && (s.weight_dtype == s.dtype || s.weight_dtype == DType::float32);
}

// blocks and the units they own are counted in 32 bits
inline bool launchable(const GroupNormSiluShape &s, const GroupNormPlan &p) {
    return p.blocks <= INT32_MAX && s.n * s.groups <= INT32_MAX && s.n * p.slices * p.chunks <= UINT32_MAX;
}

// Bytes of workspace for a call on the current device (on a large one where there is none).
inline int64_t group_norm_silu_workspace(int64_t n, int64_t c_total, int64_t hw, int64_t groups, bool channels_last,
                                         bool backward) {
    int processors = 0;
    if (multiprocessors(&processors) != cudaSuccess)
        processors = kLargeDevice;
    const GroupNormSiluShape shape{n, c_total, 0, hw, groups, false, channels_last, DType::float32, DType::float32};
    return workspace_bytes(shape, backward, processors);
}

// The workspace has group_norm_silu_workspace(...) bytes and may hold anything.
inline cudaError_t group_norm_silu_forward(const void *x, const void *skip, const void *weight, const void *bias,
                                           const void *channel_add, void *y, float *mean, float *rstd, void *workspace,
                                           int64_t n, int64_t c, int64_t c_skip, int64_t hw, int64_t groups, double eps,
                                           bool silu, bool channels_last, int dtype, int weight_dtype,
                                           cudaStream_t stream) {
    const GroupNormSiluShape shape{
        n, c, c_skip, hw, groups, silu, channels_last, static_cast<DType>(dtype), static_cast<DType>(weight_dtype)};
    if (!valid_shape(shape))
        return cudaErrorInvalidValue;
    if (n == 0 || hw == 0)
        return cudaSuccess;
    int processors = 0;
    if (const cudaError_t error = multiprocessors(&processors); error != cudaSuccess)
        return error;
    const int vector = vector_width(shape, aligned16(x, skip, y));
    const GroupNormPlan plan = group_norm_plan(shape, vector, false, processors);
    if (!launchable(shape, plan))
        return cudaErrorInvalidValue;
    const GroupNormSiluForward call{shape, x, skip, weight, bias, channel_add, y, mean, rstd, eps};
    const ForwardLaunch launch{call, plan, static_cast<float2 *>(workspace), false};
    return dispatch(shape.dtype, vector, [&](auto element, auto width) {
        return launch_forward<decltype(element), decltype(width)::value>(launch, stream);
    });
}

} // namespace kolors_fast
