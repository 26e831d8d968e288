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

struct ScaleAndFilter {
    const void *x;      // [numel]
    const float *scale; // [1]
    void *out;          // [numel]
    int64_t numel;
    DType dtype;     // of x
    DType out_dtype; // of out
};

struct UnscaleAndFilter {
    const void *x;      // [numel]
    const float *scale; // [1]
    const void *add;    // [numel] or null
    void *out;          // [numel]
    int64_t numel;
    DType dtype;     // of x
    DType add_dtype; // of add: dtype or float32
    DType out_dtype; // of out
};

// A row of the table of a multi-tensor op, as the host writes it.
struct TensorEntry {
    int64_t address, numel, dtype;
};

struct UnscaleGrads {
    const TensorEntry *table; // [tensors], in host memory
    const float *scales;      // [tensors], scale_stride apart
    float *norm;              // [1]
    bool *nonfinite;          // [tensors]
    int64_t tensors;
    int64_t scale_stride;
};

// The LayerNorm family: r = x + gate * y; out = (r - mean) * rstd * factor + shift, statistics over d.
//   ada_layer_norm                 no y, no gate: r is x; factor = 1 + scale
//   gated_residual_ada_layer_norm  gate may be absent: ones; factor = 1 + scale
//   residual_layer_norm            no gate; factor = scale, the weight, and shift, the bias, of all samples (batch is
//   1)
// r is rounded to its dtype, and the statistics are those of the rounded r.
struct LayerNormShape {
    int64_t batch, rows, d; // rows of one sample
    DType dtype;            // of x, y, r, out and their gradients
    DType parameter_dtype;  // of gate, scale and shift: dtype or float32
};

struct LayerNormForward {
    LayerNormShape shape;
    const void *x;                                   // [batch, rows, d]
    const void *y;                                   // [batch, rows, d] or null
    const void *gate;                                // [batch, d] or null
    const void *scale;                               // [batch, d]
    const void *shift;                               // [batch, d]
    int64_t gate_stride, scale_stride, shift_stride; // elements from one sample's row to the next
    void *r;                                         // [batch, rows, d], null without y
    void *out;                                       // [batch, rows, d]
    float *statistics;                               // [2, batch * rows]: mean, then rstd
    double eps;
};

struct LayerNormBackward {
    LayerNormShape shape;
    const void *grad_r;                // [batch, rows, d] or null: added to the gradient of the LayerNorm
    const void *grad_out;              // [batch, rows, d]
    const void *r;                     // [batch, rows, d], as stored
    const void *y;                     // [batch, rows, d], read for grad_gate only
    const void *gate;                  // [batch, d] or null
    const void *scale;                 // [batch, d]
    int64_t gate_stride, scale_stride; // elements from one sample's row to the next
    const float *statistics;           // [2, batch * rows]
    void *grad_x;                      // [batch, rows, d] or null; without a gate that of y too
    void *grad_y;                      // [batch, rows, d] or null: gate times that of x
    float *grad_gate;                  // [batch, d] or null
    float *grad_scale;                 // [batch, d] or null
    float *grad_shift;                 // [batch, d] or null
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

// [batch, tokens, heads, head_dim]: each row of head_dim is contiguous, the other strides are free, in elements.
template <typename Data> struct AttentionRows {
    Data *data;
    int64_t batch, token, head;
};

struct Attention {
    AttentionRows<const float> q, k, v;
    const float *bias; // [batch, keys] or null
    float *out;        // [batch, queries, heads, head_dim]
    int64_t batch, heads, queries, keys, head_dim;
    float scale;
};

// y = sum over heads of softmax(x K_h + bias) V_h + out_bias; K [dim, heads * keys] and V [heads * keys, dim] of each
// sample are packed as the weights of two linear layers.
struct FoldedAttention {
    const float *x; // [batch, tokens, dim]
    const float *packed_keys, *packed_values;
    const float *bias;     // [batch, heads * keys]
    const float *out_bias; // [dim]
    float *y;              // [batch, tokens, dim]
    int64_t batch, tokens, dim, heads, keys;
};

// y = x w^T + bias + add; gated: w is [2 * width, depth], value and gate, and y = value * gelu(gate).
struct LinearShape {
    int64_t depth, width; // width of y
    bool gated;
};

struct PackLinear {
    LinearShape shape;
    const float *weight; // [width or 2 * width, depth]
    int64_t row_stride;  // of weight
    float *packed;       // as `linear` reads it
};

struct Linear {
    LinearShape shape;
    const float *x; // [rows, depth]
    const float *packed;
    const float *bias; // [width or 2 * width] or null
    const float *add;  // [rows, width] or null; not where gated or gelu
    float *y;          // [rows, width]
    int64_t rows;
    int64_t row_stride; // of x; everything else is dense
    bool gelu;          // in the tanh form, of the result; not where gated
};

// A 3x3 convolution of stride 1 and padding 1.
struct WinogradShape {
    int64_t batch, height, width, channels, out;
};

struct PackWinograd {
    WinogradShape shape;
    const float *weight; // [out, 3, 3, channels]
    float *packed;       // as `winograd` reads it
};

struct Winograd {
    WinogradShape shape;
    const float *x; // [batch, height, width, channels]
    const float *packed;
    const float *bias; // [out] or null
    float *y;          // [batch, height, width, out]
};

} // namespace kolors_fast
