// The CUDA launchers compiled for the SIMT machine: pointers to them, to be called through ctypes.
#include "cuda/ada_layer_norm.cuh"
#include "cuda/gated_residual_ada_layer_norm.cuh"
#include "cuda/group_norm_silu.cuh"
#include "cuda/group_norm_silu_backward.cuh"
#include "cuda/guided_step.cuh"
#include "cuda/qk_norm.cuh"
#include "cuda/scale_and_filter.cuh"
#include "cuda/unscale_and_filter.cuh"
#include "cuda/unscale_grads.cuh"

#define EXPORT(name) decltype(&kolors_fast::name) name = kolors_fast::name

extern "C" {
EXPORT(group_norm_silu_forward);
EXPORT(group_norm_silu_backward);
EXPORT(group_norm_silu_workspace);
EXPORT(guided_step);
EXPORT(scale_and_filter);
EXPORT(unscale_and_filter);
EXPORT(unscale_grads);
EXPORT(unscale_grads_workspace);
EXPORT(qk_norm_forward);
EXPORT(qk_norm_backward);
EXPORT(qk_norm_workspace);
EXPORT(ada_layer_norm_forward);
EXPORT(ada_layer_norm_backward);
EXPORT(ada_layer_norm_workspace);
EXPORT(gated_residual_ada_layer_norm_forward);
EXPORT(gated_residual_ada_layer_norm_backward);
EXPORT(gated_residual_ada_layer_norm_workspace);

void configure(int multiprocessors, bool reversed) {
    simt::multiprocessors = multiprocessors;
    simt::reversed = reversed;
}

// blocks, threads, chunks, rows, slices, slice_channels, parts, columns, row_lanes
void group_norm_plan(int64_t n, int64_t c_total, int64_t hw, int64_t groups, bool channels_last, int vector,
                     bool backward, int multiprocessors, int64_t *out) {
    using kolors_fast::DType;
    const kolors_fast::GroupNormSiluShape shape{
        n, c_total, 0, hw, groups, false, channels_last, DType::float32, DType::float32};
    const kolors_fast::GroupNormPlan p = kolors_fast::group_norm_plan(shape, vector, backward, multiprocessors);
    const int64_t fields[] = {p.blocks,         p.threads, p.chunks,  p.rows,     p.slices,
                              p.slice_channels, p.parts,   p.columns, p.row_lanes};
    std::copy(std::begin(fields), std::end(fields), out);
}

// rows and chunks of a sample, threads
void layer_norm_plan(int64_t batch, int64_t rows, int64_t d, int multiprocessors, int64_t *out) {
    using kolors_fast::DType;
    const kolors_fast::LayerNormShape shape{batch, rows, d, DType::float32, DType::float32};
    const kolors_fast::LayerNormPlan p = kolors_fast::layer_norm_plan(shape, multiprocessors);
    const int64_t fields[] = {p.rows, p.chunks, p.threads};
    std::copy(std::begin(fields), std::end(fields), out);
}
}
