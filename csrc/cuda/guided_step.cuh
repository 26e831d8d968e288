// Guidance and one scheduler step in one pass over the latents:
//   guided   = sum_p weights[p] * predictions[p]
//   out      = c0 * sample + c1 * guided + c2 * previous + c3 * noise
//   denoised = c4 * sample + c5 * guided
// Weights, coefficients and the row of the step table are read from device memory, so that a captured graph
// replays a whole trajectory.
#pragma once

#include "common/arguments.h"
#include "cuda/common.cuh"

namespace kolors_fast {

constexpr int kStepThreads = 128;
constexpr int kStepCoefficients = 6;

template <typename T, int V> __global__ void __launch_bounds__(kStepThreads) guided_step_kernel(const GuidedStep a) {
    const int64_t at = (static_cast<int64_t>(blockIdx.x) * kStepThreads + threadIdx.x) * V;
    if (at >= a.numel)
        return;
    const Pack<T, V> sample = load<T, V>(static_cast<const T *>(a.sample) + at);
    Pack<T, V> previous = {};
    Pack<T, V> noise = {};
    if (a.previous)
        previous = load<T, V>(static_cast<const T *>(a.previous) + at);
    if (a.noise)
        noise = load<T, V>(static_cast<const T *>(a.noise) + at);
    const float *const c = a.coefficients + (a.row ? *a.row * kStepCoefficients : 0);

    float guided[V] = {};
    for (int p = 0; p < a.num_predictions; ++p) {
        const Pack<T, V> prediction = load<T, V>(static_cast<const T *>(a.predictions) + p * a.numel + at);
        const float weight = a.weights[p];
#pragma unroll
        for (int j = 0; j < V; ++j)
            guided[j] += weight * prediction.get(j);
    }
    float v[V];
#pragma unroll
    for (int j = 0; j < V; ++j)
        v[j] = c[0] * sample.get(j) + c[1] * guided[j];
    if (a.previous) {
        const float factor = c[2];
#pragma unroll
        for (int j = 0; j < V; ++j)
            v[j] += factor * previous.get(j);
    }
    if (a.noise) {
        const float factor = c[3];
#pragma unroll
        for (int j = 0; j < V; ++j)
            v[j] += factor * noise.get(j);
    }
    store<T, V>(static_cast<T *>(a.out) + at, v);
    if (a.denoised) {
        const float keep = c[4];
        const float factor = c[5];
#pragma unroll
        for (int j = 0; j < V; ++j)
            v[j] = keep * sample.get(j) + factor * guided[j];
        store<T, V>(static_cast<T *>(a.denoised) + at, v);
    }
}

template <typename T, int V> inline cudaError_t launch_guided_step(const GuidedStep &a, cudaStream_t stream) {
    const int64_t per_block = int64_t{kStepThreads} * V;
    const int64_t blocks = (a.numel + per_block - 1) / per_block;
    if (blocks > INT32_MAX)
        return cudaErrorInvalidValue;
    auto kernel = guided_step_kernel<T, V>;
    KF_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kStepThreads), 0, stream, a);
    return cudaGetLastError();
}

// Everything in fp32, one rounding at each store. out and denoised may be an input itself (each thread reads what it
// needs before it writes), but may not overlap one at another offset.
inline cudaError_t guided_step(const void *sample, const void *predictions, const float *weights,
                               const float *coefficients, const int64_t *row, const void *previous, const void *noise,
                               void *out, void *denoised, int64_t numel, int num_predictions, int dtype,
                               cudaStream_t stream) {
    if (numel < 0 || num_predictions < 1 || !is_dtype(dtype))
        return cudaErrorInvalidValue;
    if (numel == 0)
        return cudaSuccess;
    const GuidedStep a{sample,   predictions, weights,         coefficients,
                       row,      previous,    noise,           out,
                       denoised, numel,       num_predictions, static_cast<DType>(dtype)};
    const int wide = a.dtype == DType::float32 ? 4 : 8;
    const bool aligned = numel % wide == 0 && aligned16(sample, predictions, previous, noise, out, denoised);
    return dispatch(a.dtype, aligned ? wide : 1, [&](auto element, auto width) {
        return launch_guided_step<decltype(element), decltype(width)::value>(a, stream);
    });
}

} // namespace kolors_fast
