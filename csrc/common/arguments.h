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

// Rows of one tensor [batch, tokens, heads, D]: each is contiguous, the other strides are free, in elements.
template <typename Data> struct QkNormRows {
    Data *data;
    int64_t batch, token, head;
};

// One tensor that is normalised, or copied, to its place in an output. Python writes an array of these as int64.
struct QkNormPart {
    QkNormRows<const void> x;
    QkNormRows<void> y;          // forward: where it goes; backward: the gradient of x, or null
    QkNormRows<const void> grad; // backward: of what the forward pass wrote
    const void *weight;          // [D] or null: copied
    float *grad_weight;          // [D] or null
    int64_t tokens;
};
static_assert(sizeof(QkNormPart) == 15 * 8, "fifteen words");

constexpr int kQkNormParts = 6; // q, k and v of two streams

struct QkNorm {
    const QkNormPart *parts;
    int count;
    int64_t batch, heads, head_dim;
    double eps;
    DType dtype;
    DType weight_dtype; // of all weights: dtype or float32
};

} // namespace kolors_fast
