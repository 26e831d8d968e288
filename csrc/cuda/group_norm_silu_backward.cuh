// Backward of GroupNorm+SiLU. With x_hat = (x + channel_add - mean) * rstd, z = x_hat * weight + bias and
// d = grad_y * silu'(z), one pass over grad_y and x leaves per (sample, channel)
//   D = sum d,   E = sum d * x_hat,   X = sum x_hat
// from which everything but grad_x follows: grad_bias = sum_n D, grad_weight = sum_n E, the two means of a group
//   m1 = sum_c weight * D / count,   m2 = sum_c weight * E / count,
// and grad_channel_add = rstd * (weight * D - hw * m1 - m2 * X). A second pass writes
//   grad_x = rstd * (d * weight - m1 - x_hat * m2).
// x_hat is recomputed from mean and rstd. Sums are fp32 in a fixed order, without atomics.
#pragma once

#include "cuda/group_norm_silu.cuh"

#include <utility>

namespace kolors_fast {

// two tensors are read, so 32 bytes of each are in flight per thread
template <int V> constexpr int kBackwardUnroll = V == 1 ? 4 : 2;
constexpr int kSums = 3;
constexpr int kTotalThreads = 128;

struct BackwardLaunch {
    GroupNormSiluBackward call;
    GroupNormPlan plan;
    float *partials;     // [n, chunks, D E X, C]
    float *totals;       // [n, D E X, C]
    float2 *group_means; // [n, groups]: m1, m2
};

// What is constant along one channel of one sample.
struct ChannelTerms {
    float center, rstd, weight, bias;
};

template <typename T>
__device__ __forceinline__ ChannelTerms channel_terms(const BackwardLaunch &a, int64_t n, int channel) {
    const int all = static_cast<int>(a.call.shape.c + a.call.shape.c_skip);
    const int64_t group = n * a.call.shape.groups + channel / (all / static_cast<int>(a.call.shape.groups));
    return {a.call.mean[group] - load_or_zero<T>(a.call.channel_add, n * all + channel), a.call.rstd[group],
            load_any(a.call.weight, channel, a.call.shape.weight_dtype, 1.0f),
            load_any(a.call.bias, channel, a.call.shape.weight_dtype, 0.0f)};
}

// grad_y * silu'(z), with silu'(z) = s * (1 + z * (1 - s)) and s = sigmoid(z)
template <typename T> __device__ __forceinline__ float grad_before_silu(float grad_y, float z, bool silu) {
    if (!silu)
        return grad_y;
    const float s = sigmoid<T>(z);
    return grad_y * (s * (1.0f + z * (1.0f - s)));
}

// D, E and X of V neighbouring channels
template <int V> struct ChannelSums {
    float sums[kSums][V] = {};

    __device__ __forceinline__ void add(int j, float d, float x_hat) {
        sums[0][j] += d;
        sums[1][j] += d * x_hat;
        sums[2][j] += x_hat;
    }
};

__device__ __forceinline__ float *partial_of(const BackwardLaunch &a, int64_t n, int chunk, int sum, int channel) {
    const int64_t all = a.call.shape.c + a.call.shape.c_skip;
    return a.partials + ((n * a.plan.chunks + chunk) * kSums + sum) * all + channel;
}

// The terms of a tile's channels in shared memory [4][slice_channels]; ends with a barrier.
template <typename T>
__device__ __forceinline__ void share_terms(const BackwardLaunch &a, const Tile &t, float *shared) {
    for (int i = threadIdx.x; i < t.channels; i += blockDim.x) {
        const ChannelTerms terms = channel_terms<T>(a, t.n, t.channel + i);
        shared[i] = terms.center;
        shared[a.plan.slice_channels + i] = terms.rstd;
        shared[2 * a.plan.slice_channels + i] = terms.weight;
        shared[3 * a.plan.slice_channels + i] = terms.bias;
    }
    __syncthreads();
}

template <int V> __device__ __forceinline__ void read_terms(const float *shared, int stride, ChannelTerms (&terms)[V]) {
    float center[V], rstd[V], weight[V], bias[V];
    read_shared(shared, center);
    read_shared(shared + stride, rstd);
    read_shared(shared + 2 * stride, weight);
    read_shared(shared + 3 * stride, bias);
#pragma unroll
    for (int j = 0; j < V; ++j)
        terms[j] = {center[j], rstd[j], weight[j], bias[j]};
}

template <typename T, int V> __global__ void __launch_bounds__(kThreads, kBackwardResidency)
    group_norm_sums_channels_last(const BackwardLaunch a) {
    KF_SHARED(float, shared); // [4][slice_channels], then [kSums * V][kThreads]
    constexpr int U = kBackwardUnroll<V>;
    const GroupNormSiluShape &s = a.call.shape;
    const GroupNormPlan &p = a.plan;
    const Tile t = tile_of(s, p);
    const Place<V> place(t, p);
    share_terms<T>(a, t, shared);

    ChannelSums<V> sums;
    if (place.active) {
        const int channel = t.channel + place.channel;
        const int64_t all = s.c + s.c_skip;
        const T *const grad = static_cast<const T *>(a.call.grad_y) + t.n * s.hw * all + channel;
        const Column<const T> in =
            column_of(static_cast<const T *>(a.call.x), static_cast<const T *>(a.call.skip), s, t.n, channel);
        ChannelTerms terms[V];
        read_terms(shared + place.channel, p.slice_channels, terms);
        for (int row = t.row_begin + place.lane; row < t.row_end; row += U * p.row_lanes) {
            Pack<T, V> grads[U], packs[U];
#pragma unroll
            for (int u = 0; u < U; ++u) {
                const int r = row + u * p.row_lanes;
                if (r < t.row_end) {
                    grads[u] = load<T, V>(grad + r * all);
                    packs[u] = load<T, V>(in.at(r));
                }
            }
#pragma unroll
            for (int u = 0; u < U; ++u) {
                if (row + u * p.row_lanes < t.row_end) {
#pragma unroll
                    for (int j = 0; j < V; ++j) {
                        const float x_hat = (packs[u].get(j) - terms[j].center) * terms[j].rstd;
                        const float z = x_hat * terms[j].weight + terms[j].bias;
                        sums.add(j, grad_before_silu<T>(grads[u].get(j), z, s.silu), x_hat);
                    }
                }
            }
        }
    }
    __syncthreads(); // the terms are no longer needed

    const auto save = [&](int slot) {
#pragma unroll
        for (int i = 0; i < kSums * V; ++i)
            shared[i * kThreads + slot] = sums.sums[i / V][i % V];
    };
    const auto take = [&](int slot) {
#pragma unroll
        for (int i = 0; i < kSums * V; ++i)
            sums.sums[i / V][i % V] += shared[i * kThreads + slot];
    };
    merge_row_lanes(p, place, save, take);
    if (place.active && place.lane == 0) {
#pragma unroll
        for (int i = 0; i < kSums * V; ++i) {
            *partial_of(a, t.n, t.chunk, i / V, t.channel + place.channel + i % V) = sums.sums[i / V][i % V];
        }
    }
}

template <typename T, int V> __global__ void __launch_bounds__(kThreads, kBackwardResidency)
    group_norm_sums_planes(const BackwardLaunch a) {
    constexpr int U = kBackwardUnroll<V>;
    const GroupNormSiluShape &s = a.call.shape;
    const Segment g = segment_of(s, a.plan);
    if (!g.valid)
        return;
    const T *const grad = static_cast<const T *>(a.call.grad_y) + (g.n * (s.c + s.c_skip) + g.channel) * s.hw;
    const T *const in =
        plane_of(static_cast<const T *>(a.call.x), static_cast<const T *>(a.call.skip), s, g.n, g.channel);
    const ChannelTerms terms = channel_terms<T>(a, g.n, g.channel);
    const int lane = threadIdx.x % kWarp;
    ChannelSums<1> sums;
    for (int i = g.begin + lane * V; i < g.end; i += U * kWarp * V) {
        Pack<T, V> grads[U], packs[U];
#pragma unroll
        for (int u = 0; u < U; ++u) {
            const int at = i + u * kWarp * V;
            if (at < g.end) {
                grads[u] = load<T, V>(grad + at);
                packs[u] = load<T, V>(in + at);
            }
        }
#pragma unroll
        for (int u = 0; u < U; ++u) {
            if (i + u * kWarp * V < g.end) {
#pragma unroll
                for (int j = 0; j < V; ++j) {
                    const float x_hat = (packs[u].get(j) - terms.center) * terms.rstd;
                    const float z = x_hat * terms.weight + terms.bias;
                    sums.add(0, grad_before_silu<T>(grads[u].get(j), z, s.silu), x_hat);
                }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
        const float sum = warp_sum(sums.sums[i][0]);
        if (lane == 0)
            *partial_of(a, g.n, g.chunk, i, g.channel) = sum;
    }
}

// One block per (sample, group): totals over the chunks, the two means, and grad_channel_add.
__global__ void __launch_bounds__(kTotalThreads) group_norm_group_means(const BackwardLaunch a) {
    KF_SHARED(float, shared); // [kSums][kTotalThreads]
    const GroupNormSiluShape &s = a.call.shape;
    const int64_t all = s.c + s.c_skip;
    const int groups = static_cast<int>(s.groups);
    const int per_group = static_cast<int>(all) / groups;
    const int64_t n = blockIdx.x / groups;
    const int first = blockIdx.x % groups * per_group;
    const int columns = min(per_group, kTotalThreads);
    const int lanes = kTotalThreads / columns;
    const int column = threadIdx.x % columns;
    const int lane = threadIdx.x / columns;

    float weighted_d = 0.0f;
    float weighted_e = 0.0f;
    for (int begin = 0; begin < per_group; begin += columns) {
        const bool exists = begin + column < per_group;
        const int channel = first + begin + column;
        float sums[kSums] = {};
        if (exists && lane < lanes) {
            for (int chunk = lane; chunk < a.plan.chunks; chunk += lanes) {
#pragma unroll
                for (int i = 0; i < kSums; ++i)
                    sums[i] += *partial_of(a, n, chunk, i, channel);
            }
        }
#pragma unroll
        for (int i = 0; i < kSums; ++i)
            shared[i * kTotalThreads + threadIdx.x] = sums[i];
        __syncthreads();
        if (exists && lane == 0) {
            for (int other = 1; other < lanes; ++other) {
#pragma unroll
                for (int i = 0; i < kSums; ++i)
                    sums[i] += shared[i * kTotalThreads + other * columns + column];
            }
#pragma unroll
            for (int i = 0; i < kSums; ++i)
                a.totals[(n * kSums + i) * all + channel] = sums[i];
            const float weight = load_any(a.call.weight, channel, s.weight_dtype, 1.0f);
            weighted_d += weight * sums[0];
            weighted_e += weight * sums[1];
        }
        __syncthreads();
    }

    constexpr int kWarps = kTotalThreads / kWarp;
    weighted_d = warp_sum(weighted_d);
    weighted_e = warp_sum(weighted_e);
    if (threadIdx.x % kWarp == 0) {
        shared[threadIdx.x / kWarp] = weighted_d;
        shared[kWarps + threadIdx.x / kWarp] = weighted_e;
    }
    __syncthreads();
    float m1 = 0.0f;
    float m2 = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
        m1 += shared[w];
        m2 += shared[kWarps + w];
    }
    const float positions = static_cast<float>(s.hw);
    const float count = positions * static_cast<float>(per_group);
    m1 /= count;
    m2 /= count;
    if (threadIdx.x == 0)
        a.group_means[blockIdx.x] = make_float2(m1, m2);
    if (!a.call.grad_channel_add || lane != 0)
        return;
    const float rstd = a.call.rstd[blockIdx.x];
    for (int channel = first + column; channel < first + per_group; channel += columns) {
        const float d = a.totals[n * kSums * all + channel]; // this thread wrote them
        const float x_hat = a.totals[(n * kSums + 2) * all + channel];
        const float weight = load_any(a.call.weight, channel, s.weight_dtype, 1.0f);
        a.call.grad_channel_add[n * all + channel] = rstd * (weight * d - positions * m1 - m2 * x_hat);
    }
}

// A thread per channel adds the samples in order.
__global__ void __launch_bounds__(kTotalThreads) group_norm_grad_affine(const BackwardLaunch a) {
    const int64_t all = a.call.shape.c + a.call.shape.c_skip;
    const int64_t channel = static_cast<int64_t>(blockIdx.x) * kTotalThreads + threadIdx.x;
    if (channel >= all)
        return;
    float d = 0.0f;
    float e = 0.0f;
    for (int64_t n = 0; n < a.call.shape.n; ++n) {
        d += a.totals[n * kSums * all + channel];
        e += a.totals[(n * kSums + 1) * all + channel];
    }
    if (a.call.grad_bias)
        a.call.grad_bias[channel] = d;
    if (a.call.grad_weight)
        a.call.grad_weight[channel] = e;
}

// grad_x of one element
template <typename T>
__device__ __forceinline__ float grad_input(float grad_y, float x, const ChannelTerms &terms, float2 means, bool silu) {
    const float x_hat = (x - terms.center) * terms.rstd;
    const float z = x_hat * terms.weight + terms.bias;
    const float d = grad_before_silu<T>(grad_y, z, silu);
    return terms.rstd * (d * terms.weight - means.x - x_hat * means.y);
}

// the gradient of x or of skip, whichever holds the channel, is wanted
__device__ __forceinline__ bool wanted(const GroupNormSiluBackward &call, int channel) {
    return channel < call.shape.c ? call.grad_x != nullptr : call.grad_skip != nullptr;
}

template <typename T, int V> __global__ void __launch_bounds__(kThreads, kBackwardResidency)
    group_norm_grad_channels_last(const BackwardLaunch a) {
    KF_SHARED(float, shared); // [6][slice_channels]: the terms, m1, m2
    constexpr int U = kBackwardUnroll<V>;
    const GroupNormSiluShape &s = a.call.shape;
    const GroupNormPlan &p = a.plan;
    const Tile t = tile_of(s, p);
    const Place<V> place(t, p);
    const int per_group = t.channels / t.groups;
    float *const m1 = shared + 4 * p.slice_channels;
    float *const m2 = shared + 5 * p.slice_channels;
    for (int i = threadIdx.x; i < t.channels; i += blockDim.x) {
        const float2 means = a.group_means[t.n * s.groups + t.group + i / per_group];
        m1[i] = means.x;
        m2[i] = means.y;
    }
    share_terms<T>(a, t, shared);
    const int channel = t.channel + place.channel;
    if (!place.active || !wanted(a.call, channel))
        return;

    const int64_t all = s.c + s.c_skip;
    const T *const grad = static_cast<const T *>(a.call.grad_y) + t.n * s.hw * all + channel;
    const Column<const T> in =
        column_of(static_cast<const T *>(a.call.x), static_cast<const T *>(a.call.skip), s, t.n, channel);
    const Column<T> out =
        column_of(static_cast<T *>(a.call.grad_x), static_cast<T *>(a.call.grad_skip), s, t.n, channel);
    ChannelTerms terms[V];
    float mean_1[V], mean_2[V];
    read_terms(shared + place.channel, p.slice_channels, terms);
    read_shared(m1 + place.channel, mean_1);
    read_shared(m2 + place.channel, mean_2);
    const int step = U * p.row_lanes;
    const int first = t.row_begin + place.lane;
    for (int row = first + (t.row_end - 1 - t.row_begin) / step * step; row >= first; row -= step) {
        Pack<T, V> grads[U], packs[U];
#pragma unroll
        for (int u = 0; u < U; ++u) {
            const int r = row + u * p.row_lanes;
            if (r < t.row_end) {
                grads[u] = load<T, V>(grad + r * all);
                packs[u] = load<T, V>(in.at(r));
            }
        }
#pragma unroll
        for (int u = 0; u < U; ++u) {
            const int r = row + u * p.row_lanes;
            if (r < t.row_end) {
                float v[V];
#pragma unroll
                for (int j = 0; j < V; ++j) {
                    const float2 means = make_float2(mean_1[j], mean_2[j]);
                    v[j] = grad_input<T>(grads[u].get(j), packs[u].get(j), terms[j], means, s.silu);
                }
                store<T, V>(out.at(r), v);
            }
        }
    }
}

template <typename T, int V> __global__ void __launch_bounds__(kThreads, kBackwardResidency)
    group_norm_grad_planes(const BackwardLaunch a) {
    constexpr int U = kBackwardUnroll<V>;
    const GroupNormSiluShape &s = a.call.shape;
    const Segment g = segment_of(s, a.plan);
    if (!g.valid)
        return;
    const T *const grad = static_cast<const T *>(a.call.grad_y) + (g.n * (s.c + s.c_skip) + g.channel) * s.hw;
    const T *const in =
        plane_of(static_cast<const T *>(a.call.x), static_cast<const T *>(a.call.skip), s, g.n, g.channel);
    if (!wanted(a.call, g.channel))
        return;
    T *const out = plane_of(static_cast<T *>(a.call.grad_x), static_cast<T *>(a.call.grad_skip), s, g.n, g.channel);
    const ChannelTerms terms = channel_terms<T>(a, g.n, g.channel);
    const float2 means = a.group_means[g.n * s.groups + g.channel / a.plan.parts];
    constexpr int kStep = U * kWarp * V;
    const int first = g.begin + threadIdx.x % kWarp * V;
    for (int i = first + (g.end - 1 - g.begin) / kStep * kStep; i >= first; i -= kStep) {
        Pack<T, V> grads[U], packs[U];
#pragma unroll
        for (int u = 0; u < U; ++u) {
            const int at = i + u * kWarp * V;
            if (at < g.end) {
                grads[u] = load<T, V>(grad + at);
                packs[u] = load<T, V>(in + at);
            }
        }
#pragma unroll
        for (int u = 0; u < U; ++u) {
            const int at = i + u * kWarp * V;
            if (at < g.end) {
                float v[V];
#pragma unroll
                for (int j = 0; j < V; ++j) {
                    v[j] = grad_input<T>(grads[u].get(j), packs[u].get(j), terms, means, s.silu);
                }
                store<T, V>(out + at, v);
            }
        }
    }
}

template <typename T, int V> inline cudaError_t launch_backward(const BackwardLaunch &a, cudaStream_t stream) {
    const GroupNormPlan &p = a.plan;
    const GroupNormSiluShape &s = a.call.shape;
    const dim3 grid(static_cast<unsigned>(p.blocks));
    const dim3 block(p.threads);
    auto sums = group_norm_sums_planes<T, V>;
    auto grad = group_norm_grad_planes<T, V>;
    size_t sums_bytes = 0;
    size_t grad_bytes = 0;
    if (s.channels_last) {
        sums = group_norm_sums_channels_last<T, V>;
        grad = group_norm_grad_channels_last<T, V>;
        sums_bytes = std::max(4 * p.slice_channels, kSums * V * kThreads) * sizeof(float);
        grad_bytes = 6 * p.slice_channels * sizeof(float);
    }
    KF_LAUNCH(sums, grid, block, sums_bytes, stream, a);
    const size_t totals_bytes = kSums * kTotalThreads * sizeof(float);
    const dim3 groups(static_cast<unsigned>(s.n * s.groups));
    KF_LAUNCH(group_norm_group_means, groups, dim3(kTotalThreads), totals_bytes, stream, a);
    if (a.call.grad_weight || a.call.grad_bias) {
        const dim3 channels(static_cast<unsigned>(ceil_div(s.channels(), kTotalThreads)));
        KF_LAUNCH(group_norm_grad_affine, channels, dim3(kTotalThreads), 0, stream, a);
    }
    if (a.call.grad_x || a.call.grad_skip)
        KF_LAUNCH(grad, grid, block, grad_bytes, stream, a);
    return cudaGetLastError();
}

// an empty batch still has gradients of its parameters: zero
inline cudaError_t clear(float *grad, int64_t count, cudaStream_t stream) {
    return grad && count ? cudaMemsetAsync(grad, 0, count * sizeof(float), stream) : cudaSuccess;
}

// Any of the five gradients may be absent (0). grad_x and grad_skip have the dtype of x, the others are fp32.
// The workspace has group_norm_silu_workspace(...) bytes and may hold anything.
inline cudaError_t group_norm_silu_backward(const void *grad_y, const void *x, const void *skip, const void *weight,
                                            const void *bias, const void *channel_add, const float *mean,
                                            const float *rstd, void *grad_x, void *grad_skip, float *grad_weight,
                                            float *grad_bias, float *grad_channel_add, void *workspace, int64_t n,
                                            int64_t c, int64_t c_skip, int64_t hw, int64_t groups, bool silu,
                                            bool channels_last, int dtype, int weight_dtype, cudaStream_t stream) {
    const GroupNormSiluShape shape{
        n, c, c_skip, hw, groups, silu, channels_last, static_cast<DType>(dtype), static_cast<DType>(weight_dtype)};
    if (!valid_shape(shape))
        return cudaErrorInvalidValue;
    const int64_t all = shape.channels();
    if (n == 0 || hw == 0) {
        for (const auto &[grad, count] : {std::pair{grad_weight, all}, {grad_bias, all}, {grad_channel_add, n * all}}) {
            if (const cudaError_t error = clear(grad, count, stream); error != cudaSuccess)
                return error;
        }
        return cudaSuccess;
    }
    int processors = 0;
    if (const cudaError_t error = multiprocessors(&processors); error != cudaSuccess)
        return error;
    const int vector = vector_width(shape, aligned16(grad_y, x, skip, grad_x, grad_skip));
    const GroupNormPlan plan = group_norm_plan(shape, vector, true, processors);
    if (!launchable(shape, plan))
        return cudaErrorInvalidValue;
    const GroupNormSiluBackward call{shape, grad_y, x,      skip,      weight,      bias,      channel_add,
                                     mean,  rstd,   grad_x, grad_skip, grad_weight, grad_bias, grad_channel_add};
    float2 *const group_means = static_cast<float2 *>(workspace);
    float *const totals = reinterpret_cast<float *>(group_means + n * groups);
    const BackwardLaunch launch{call, plan, totals + kSums * n * all, totals, group_means};
    return dispatch(shape.dtype, vector, [&](auto element, auto width) {
        return launch_backward<decltype(element), decltype(width)::value>(launch, stream);
    });
}

} // namespace kolors_fast
