// The arguments of every op, as each backend receives them: raw pointers, sizes in elements.
// A null pointer means the tensor is absent, or that the output is not wanted.
#pragma once

#include "dtype.h"

#include <cstdint>

namespace kolors_fast {

// Sizes shared by both directions. C = c + c_skip; the channels of x come before those of skip.
struct GroupNormSiluShape {
    int64_t n, c, c_skip, hw, groups;
    bool silu;
    bool channels_last; // [n, hw, channels] instead of [n, channels, hw]
    DType dtype;        // of x, skip, channel_add, y and their gradients
    DType weight_dtype; // of weight and bias: dtype or float32

    int64_t channels() const { return c + c_skip; }
    int64_t group_channels() const { return channels() / groups; }
};

struct GroupNormSiluForward {
    GroupNormSiluShape shape;
    const void *x;           // [n, c, hw]
    const void *skip;        // [n, c_skip, hw] or null
    const void *weight;      // [C] or null for ones
    const void *bias;        // [C] or null for zeros
    const void *channel_add; // [n, C] or null
    void *y;                 // [n, C, hw]
    float *mean;             // [n, groups]
    float *rstd;             // [n, groups]
    double eps;
};

struct GroupNormSiluBackward {
    GroupNormSiluShape shape;
    const void *grad_y;      // [n, C, hw]
    const void *x;           // [n, c, hw]
    const void *skip;        // [n, c_skip, hw] or null
    const void *weight;      // [C] or null
    const void *bias;        // [C] or null
    const void *channel_add; // [n, C] or null
    const float *mean;       // [n, groups]
    const float *rstd;       // [n, groups]
    void *grad_x;            // [n, c, hw] or null
    void *grad_skip;         // [n, c_skip, hw] or null
    float *grad_weight;      // [C] or null
    float *grad_bias;        // [C] or null
    float *grad_channel_add; // [n, C] or null
};

struct GuidedStep {
    const void *sample;        // [numel]
    const void *predictions;   // [num_predictions, numel]
    const float *weights;      // [num_predictions]
    const float *coefficients; // [6], or [steps, 6] with row
    const int64_t *row;        // [1] or null
    const void *previous;      // [numel] or null
    const void *noise;         // [numel] or null
    void *out;                 // [numel]
    void *denoised;            // [numel] or null
    int64_t numel;
    int num_predictions;
    DType dtype; // of every tensor but weights and coefficients
};

// Gated activations: h holds two halves per row, y = value * act(gate).
struct GateForward {
    const void *h; // [rows, 2 * features]
    void *y;       // [rows, features]
    int64_t rows, features;
    int64_t row_stride; // of h; everything else is dense
    DType dtype;
};

struct GateBackward {
    const void *h;      // [rows, 2 * features]
    const void *grad_y; // [rows, features]
    void *grad_h;       // [rows, 2 * features]
    int64_t rows, features;
    int64_t row_stride; // of h; everything else is dense
    DType dtype;
};

struct RmsNormForward {
    const void *x;      // [rows, features]
    const void *weight; // [features] or null for ones
    void *y;            // [rows, features]
    float *rstd;        // [rows]
    int64_t rows, features;
    int64_t row_stride; // of x; everything else is dense
    double eps;
    DType dtype;
    DType weight_dtype; // dtype or float32
};

struct RmsNormBackward {
    const void *grad_y; // [rows, features]
    const void *x;      // [rows, features]
    const void *weight; // [features] or null for ones
    const float *rstd;  // [rows]
    void *grad_x;       // [rows, features] or null
    float *grad_weight; // [features] or null
    int64_t rows, features;
    int64_t row_stride; // of x; everything else is dense
    DType dtype;
    DType weight_dtype; // dtype or float32
};

} // namespace kolors_fast
