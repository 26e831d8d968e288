// Kernels that do wrong on purpose, and the machine's own arithmetic: what the machine must notice.
#include "cuda/common.cuh"

#include <vector>

namespace {

// each thread reads its neighbour's word, with or without the barrier that makes it valid
void exchange(float *out, bool barrier) {
    KF_SHARED(float, shared);
    shared[threadIdx.x] = static_cast<float>(threadIdx.x);
    if (barrier)
        __syncthreads();
    out[threadIdx.x] = shared[(threadIdx.x + 1) % blockDim.x];
}

// half of the block waits at a barrier, the other half at a shuffle that lacks a lane
void diverge(float *out) {
    if (threadIdx.x < 33)
        __syncthreads();
    else
        out[0] = kolors_fast::warp_sum(1.0f);
}

void load_four(const float *in, float *out) {
    kolors_fast::store<float, 4>(out, {kolors_fast::load<float, 4>(in).get(0), 0, 0, 0});
}

void sum_warp(const float *in, float *out) { out[threadIdx.x] = kolors_fast::warp_sum(in[threadIdx.x]); }

} // namespace

extern "C" {
int test_exchange(float *out, bool barrier) {
    KF_LAUNCH(exchange, dim3(1), dim3(64), 64 * sizeof(float), nullptr, out, barrier);
    return cudaGetLastError();
}
int test_diverge(float *out) {
    KF_LAUNCH(diverge, dim3(1), dim3(64), 0, nullptr, out);
    return cudaGetLastError();
}
int test_load_four(const float *in, float *out) {
    KF_LAUNCH(load_four, dim3(1), dim3(32), 0, nullptr, in, out);
    return cudaGetLastError();
}
int test_sum_warp(const float *in, float *out) {
    KF_LAUNCH(sum_warp, dim3(1), dim3(64), 0, nullptr, in, out);
    return cudaGetLastError();
}
void test_round(const float *in, __half *half, __nv_bfloat16 *bfloat, float *half_back, int count) {
    for (int i = 0; i < count; ++i) {
        half[i] = __float2half_rn(in[i]);
        bfloat[i] = __float2bfloat16_rn(in[i]);
        half_back[i] = __half2float(half[i]);
    }
}
}
