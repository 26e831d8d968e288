// The Python module kolors_fast._cpu: argument checks and exports only. Tensors arrive as addresses, 0 for absent ones.
#include "common/arguments.h"
#include "common/bindings.h"
#include "cpu/isa.h"
#include "cpu/sample.h"

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

namespace py = pybind11;
using namespace kolors_fast;

namespace {

template <typename... T, typename... Names>
void define(py::module_ &module, const char *name, void (*run)(T...), Names... names) {
    static_assert(sizeof...(T) == sizeof...(Names), "one name per argument");
    module.def(name, [run](Argument<T>... values) { run(from_argument<T>(values)...); }, py::arg(names)...);
}

DType dtype_of(const char *name, int code) {
    if (!is_dtype(code))
        throw py::value_error(std::string(name) + " must be 0 (float32), 1 (float16) or 2 (bfloat16), got " +
                              std::to_string(code));
    return static_cast<DType>(code);
}

GroupNormSiluShape checked_shape(int64_t n, int64_t c, int64_t c_skip, int64_t hw, int64_t groups, bool silu,
                                 bool channels_last, int dtype, int weight_dtype) {
    if (n < 0 || c < 0 || c_skip < 0 || hw < 0)
        throw py::value_error("n, c, c_skip and hw must not be negative");
    if (groups < 1 || (c + c_skip) % groups != 0)
        throw py::value_error("groups must divide c + c_skip = " + std::to_string(c + c_skip) + ", got " +
                              std::to_string(groups));
    return {n,
            c,
            c_skip,
            hw,
            groups,
            silu,
            channels_last,
            dtype_of("dtype", dtype),
            dtype_of("weight_dtype", weight_dtype)};
}

void forward(const void *x, const void *skip, const void *weight, const void *bias, const void *channel_add, void *y,
             float *mean, float *rstd, void *, int64_t n, int64_t c, int64_t c_skip, int64_t hw, int64_t groups,
             double eps, bool silu, bool channels_last, int dtype, int weight_dtype, void *) {
    const GroupNormSiluShape shape = checked_shape(n, c, c_skip, hw, groups, silu, channels_last, dtype, weight_dtype);
    const py::gil_scoped_release released;
    kernels().group_norm_silu_forward({shape, x, skip, weight, bias, channel_add, y, mean, rstd, eps});
}

void backward(const void *grad_y, const void *x, const void *skip, const void *weight, const void *bias,
              const void *channel_add, const float *mean, const float *rstd, void *grad_x, void *grad_skip,
              float *grad_weight, float *grad_bias, float *grad_channel_add, void *, int64_t n, int64_t c,
              int64_t c_skip, int64_t hw, int64_t groups, bool silu, bool channels_last, int dtype, int weight_dtype,
              void *) {
    const GroupNormSiluShape shape = checked_shape(n, c, c_skip, hw, groups, silu, channels_last, dtype, weight_dtype);
    const py::gil_scoped_release released;
    kernels().group_norm_silu_backward({shape, grad_y, x, skip, weight, bias, channel_add, mean, rstd, grad_x,
                                        grad_skip, grad_weight, grad_bias, grad_channel_add});
}

void step(const void *sample, const void *predictions, const float *weights, const float *coefficients,
          const int64_t *row, const void *previous, const void *noise, void *out, void *denoised, int64_t numel,
          int num_predictions, int dtype, void *) {
    if (numel < 0 || num_predictions < 0)
        throw py::value_error("numel and num_predictions must not be negative");
    const DType type = dtype_of("dtype", dtype);
    const py::gil_scoped_release released;
    kernels().guided_step({sample, predictions, weights, coefficients, row, previous, noise, out, denoised, numel,
                           num_predictions, type});
}

void scale(const void *x, const float *scale, void *out, int64_t numel, int dtype, int out_dtype, void *) {
    if (numel < 0)
        throw py::value_error("numel must not be negative");
    const DType from = dtype_of("dtype", dtype), to = dtype_of("out_dtype", out_dtype);
    const py::gil_scoped_release released;
    kernels().scale_and_filter({x, scale, out, numel, from, to});
}

void unscale(const void *x, const float *scale, const void *add, void *out, int64_t numel, int dtype, int add_dtype,
             int out_dtype, void *) {
    if (numel < 0)
        throw py::value_error("numel must not be negative");
    if (add_dtype != 0 && add_dtype != dtype)
        throw py::value_error("add_dtype must be 0 (float32) or dtype, got " + std::to_string(add_dtype));
    const DType from = dtype_of("dtype", dtype), to = dtype_of("out_dtype", out_dtype);
    const py::gil_scoped_release released;
    kernels().unscale_and_filter({x, scale, add, out, numel, from, static_cast<DType>(add_dtype), to});
}

void unscale_grads(const TensorEntry *table, const float *scales, float *norm, bool *nonfinite, void *, int64_t tensors,
                   int64_t scale_stride, void *) {
    for (int64_t t = 0; t < tensors; ++t) {
        dtype_of("dtype", static_cast<int>(table[t].dtype));
        if (table[t].numel < 0)
            throw py::value_error("numel must not be negative");
    }
    const py::gil_scoped_release released;
    kernels().unscale_grads({table, scales, norm, nonfinite, tensors, scale_stride});
}

LayerNormShape checked_rows(int64_t batch, int64_t rows, int64_t d, int dtype, int parameter_dtype) {
    if (batch < 0 || rows < 0 || d < 0)
        throw py::value_error("batch, rows and d must not be negative");
    return {batch, rows, d, dtype_of("dtype", dtype), dtype_of("parameter_dtype", parameter_dtype)};
}

void ada_forward(const void *x, const void *scale, const void *shift, void *out, float *statistics, int64_t batch,
                 int64_t rows, int64_t d, int64_t scale_stride, int64_t shift_stride, double eps, int dtype,
                 int parameter_dtype, void *) {
    const LayerNormShape shape = checked_rows(batch, rows, d, dtype, parameter_dtype);
    const py::gil_scoped_release released;
    kernels().ada_layer_norm_forward(
        {shape, x, nullptr, nullptr, scale, shift, 0, scale_stride, shift_stride, nullptr, out, statistics, eps});
}

void ada_backward(const void *grad_out, const void *x, const void *scale, const float *statistics, void *grad_x,
                  float *grad_scale, float *grad_shift, void *, int64_t batch, int64_t rows, int64_t d,
                  int64_t scale_stride, int dtype, int parameter_dtype, void *) {
    const LayerNormShape shape = checked_rows(batch, rows, d, dtype, parameter_dtype);
    const py::gil_scoped_release released;
    kernels().ada_layer_norm_backward({shape, nullptr, grad_out, x, nullptr, nullptr, scale, 0, scale_stride,
                                       statistics, grad_x, nullptr, nullptr, grad_scale, grad_shift});
}

void gated_forward(const void *x, const void *y, const void *gate, const void *scale, const void *shift, void *r,
                   void *out, float *statistics, int64_t batch, int64_t rows, int64_t d, int64_t gate_stride,
                   int64_t scale_stride, int64_t shift_stride, double eps, int dtype, int parameter_dtype, void *) {
    const LayerNormShape shape = checked_rows(batch, rows, d, dtype, parameter_dtype);
    const py::gil_scoped_release released;
    kernels().gated_residual_ada_layer_norm_forward(
        {shape, x, y, gate, scale, shift, gate_stride, scale_stride, shift_stride, r, out, statistics, eps});
}

void gated_backward(const void *grad_r, const void *grad_out, const void *r, const void *y, const void *gate,
                    const void *scale, const float *statistics, void *grad_x, void *grad_y, float *grad_gate,
                    float *grad_scale, float *grad_shift, void *, int64_t batch, int64_t rows, int64_t d,
                    int64_t gate_stride, int64_t scale_stride, int dtype, int parameter_dtype, void *) {
    const LayerNormShape shape = checked_rows(batch, rows, d, dtype, parameter_dtype);
    const py::gil_scoped_release released;
    kernels().gated_residual_ada_layer_norm_backward({shape, grad_r, grad_out, r, y, gate, scale, gate_stride,
                                                      scale_stride, statistics, grad_x, grad_y, grad_gate, grad_scale,
                                                      grad_shift});
}

void residual_forward(const void *x, const void *y, const void *weight, const void *bias, void *r, void *out,
                      float *statistics, int64_t rows, int64_t d, double eps, int dtype, int weight_dtype) {
    const LayerNormShape shape = checked_rows(1, rows, d, dtype, weight_dtype);
    const py::gil_scoped_release released;
    kernels().residual_layer_norm_forward({shape, x, y, nullptr, weight, bias, 0, 0, 0, r, out, statistics, eps});
}

void residual_backward(const void *grad_r, const void *grad_out, const void *r, const void *weight,
                       const float *statistics, void *grad_x, float *grad_weight, float *grad_bias, int64_t rows,
                       int64_t d, int dtype, int weight_dtype) {
    const LayerNormShape shape = checked_rows(1, rows, d, dtype, weight_dtype);
    const py::gil_scoped_release released;
    kernels().residual_layer_norm_backward({shape, grad_r, grad_out, r, nullptr, nullptr, weight, 0, 0, statistics,
                                            grad_x, nullptr, nullptr, grad_weight, grad_bias});
}

void check_rows(int64_t rows, int64_t features) {
    if (rows < 0 || features < 1)
        throw py::value_error("rows must not be negative, and features must be positive");
}

template <void (*Kernels::*kKernel)(const GateForward &)>
void gate_forward(const void *h, void *y, int64_t rows, int64_t features, int64_t row_stride, int dtype, void *) {
    check_rows(rows, features);
    const DType type = dtype_of("dtype", dtype);
    const py::gil_scoped_release released;
    (kernels().*kKernel)({h, y, rows, features, row_stride, type});
}

template <void (*Kernels::*kKernel)(const GateBackward &)>
void gate_backward(const void *h, const void *grad_y, void *grad_h, int64_t rows, int64_t features, int64_t row_stride,
                   int dtype, void *) {
    check_rows(rows, features);
    const DType type = dtype_of("dtype", dtype);
    const py::gil_scoped_release released;
    (kernels().*kKernel)({h, grad_y, grad_h, rows, features, row_stride, type});
}

void rms_norm_forward(const void *x, const void *weight, void *y, float *rstd, int64_t rows, int64_t features,
                      int64_t row_stride, double eps, int dtype, int weight_dtype, void *) {
    check_rows(rows, features);
    const DType type = dtype_of("dtype", dtype), weight_type = dtype_of("weight_dtype", weight_dtype);
    const py::gil_scoped_release released;
    kernels().rms_norm_forward({x, weight, y, rstd, rows, features, row_stride, eps, type, weight_type});
}

void rms_norm_backward(const void *grad_y, const void *x, const void *weight, const float *rstd, void *grad_x,
                       float *grad_weight, int64_t rows, int64_t features, int64_t row_stride, int dtype,
                       int weight_dtype, void *) {
    check_rows(rows, features);
    const DType type = dtype_of("dtype", dtype), weight_type = dtype_of("weight_dtype", weight_dtype);
    const py::gil_scoped_release released;
    kernels().rms_norm_backward(
        {grad_y, x, weight, rstd, grad_x, grad_weight, rows, features, row_stride, type, weight_type});
}

QkNorm checked_qk_norm(const QkNormPart *parts, int count, int64_t batch, int64_t heads, int64_t head_dim, double eps,
                       int dtype, int weight_dtype) {
    if (count < 0 || count > kQkNormParts)
        throw py::value_error("count must be from 0 to 6, got " + std::to_string(count));
    if (batch < 0 || heads < 0 || head_dim < 0)
        throw py::value_error("batch, heads and head_dim must not be negative");
    return {
        parts, count, batch, heads, head_dim, eps, dtype_of("dtype", dtype), dtype_of("weight_dtype", weight_dtype)};
}

void normalise(const QkNormPart *parts, int count, int64_t batch, int64_t heads, int64_t head_dim, double eps,
               int dtype, int weight_dtype, void *) {
    const QkNorm a = checked_qk_norm(parts, count, batch, heads, head_dim, eps, dtype, weight_dtype);
    const py::gil_scoped_release released;
    kernels().qk_norm_forward(a);
}

void normalise_backward(const QkNormPart *parts, void *, int count, int64_t batch, int64_t heads, int64_t head_dim,
                        double eps, int dtype, int weight_dtype, void *) {
    const QkNorm a = checked_qk_norm(parts, count, batch, heads, head_dim, eps, dtype, weight_dtype);
    const py::gil_scoped_release released;
    kernels().qk_norm_backward(a);
}

void attention(const float *q, const float *k, const float *v, const float *bias, float *out, int64_t q_batch,
               int64_t q_token, int64_t q_head, int64_t k_batch, int64_t k_token, int64_t k_head, int64_t v_batch,
               int64_t v_token, int64_t v_head, int64_t batch, int64_t heads, int64_t queries, int64_t keys,
               int64_t head_dim, double scale) {
    if (batch < 0 || heads < 0 || queries < 0 || keys < 1 || head_dim < 1)
        throw py::value_error("batch, heads and queries must not be negative, and keys and head_dim must be positive");
    const py::gil_scoped_release released;
    kernels().attention({{q, q_batch, q_token, q_head},
                         {k, k_batch, k_token, k_head},
                         {v, v_batch, v_token, v_head},
                         bias,
                         out,
                         batch,
                         heads,
                         queries,
                         keys,
                         head_dim,
                         static_cast<float>(scale)});
}

void folded_attention(const float *x, const float *packed_keys, const float *packed_values, const float *bias,
                      const float *out_bias, float *y, int64_t batch, int64_t tokens, int64_t dim, int64_t heads,
                      int64_t keys) {
    if (batch < 0 || tokens < 0 || dim < 1 || heads < 1 || keys < 1)
        throw py::value_error("batch and tokens must not be negative, and dim, heads and keys must be positive");
    const py::gil_scoped_release released;
    kernels().folded_attention({x, packed_keys, packed_values, bias, out_bias, y, batch, tokens, dim, heads, keys});
}

void check_linear(int64_t depth, int64_t width) {
    if (depth < 1 || width < 1)
        throw py::value_error("depth and width must be positive");
}

void pack_linear(const float *weight, float *packed, int64_t row_stride, int64_t depth, int64_t width, bool gated) {
    check_linear(depth, width);
    const py::gil_scoped_release released;
    kernels().pack_linear({{depth, width, gated}, weight, row_stride, packed});
}

void linear(const float *x, const float *packed, const float *bias, const float *add, float *y, int64_t rows,
            int64_t row_stride, int64_t depth, int64_t width, bool gated, bool gelu) {
    check_linear(depth, width);
    if ((gated || gelu) && add)
        throw py::value_error("add must be absent where gated or gelu");
    if (gated && gelu)
        throw py::value_error("gated and gelu exclude each other");
    const py::gil_scoped_release released;
    kernels().linear({{depth, width, gated}, x, packed, bias, add, y, rows, row_stride, gelu});
}

void pack_winograd(const float *weight, float *packed, int64_t channels, int64_t out) {
    const py::gil_scoped_release released;
    kernels().pack_winograd({{0, 0, 0, channels, out}, weight, packed});
}

void winograd(const float *x, const float *packed, const float *bias, float *y, int64_t batch, int64_t height,
              int64_t width, int64_t channels, int64_t out) {
    const py::gil_scoped_release released;
    kernels().winograd({{batch, height, width, channels, out}, x, packed, bias, y});
}

} // namespace

PYBIND11_MODULE(_cpu, module) {
    using py::arg;
    module.doc() = "CPU kernels of kolors_fast. Tensors are addresses (0: absent); dtypes are 0 float32, 1 float16, "
                   "2 bfloat16. workspace and stream are for the GPU and ignored.";
    module.def("isa", &isa,
               "The instruction set in use: avx512bf16, avx512, avx2 or generic (KOLORS_FAST_CPU_ISA forces one).");
    module.def(
        "sample", [](uintptr_t data, size_t bytes) { return sample(reinterpret_cast<const void *>(data), bytes); },
        py::arg("data"), py::arg("bytes"), "Hash of 64 words spread over `bytes` bytes at the address `data`.");
    module.def(
        "build_info", [] { return py::dict(arg("compiler") = __VERSION__, arg("cuda") = KOLORS_FAST_CUDA_STATUS); },
        "The compiler, and whether the CUDA extension was built or why not.");
    define(module, "group_norm_silu_forward", &forward, "x", "skip", "weight", "bias", "channel_add", "y", "mean",
           "rstd", "workspace", "n", "c", "c_skip", "hw", "groups", "eps", "silu", "channels_last", "dtype",
           "weight_dtype", "stream");
    define(module, "group_norm_silu_backward", &backward, "grad_y", "x", "skip", "weight", "bias", "channel_add",
           "mean", "rstd", "grad_x", "grad_skip", "grad_weight", "grad_bias", "grad_channel_add", "workspace", "n", "c",
           "c_skip", "hw", "groups", "silu", "channels_last", "dtype", "weight_dtype", "stream");
    module.def(
        "group_norm_silu_workspace", [](int64_t, int64_t, int64_t, int64_t, bool, bool) { return 0; }, arg("n"),
        arg("c_total"), arg("hw"), arg("groups"), arg("channels_last"), arg("backward"),
        "Bytes of workspace: none, the CPU kernels allocate their own.");
    define(module, "guided_step", &step, "sample", "predictions", "weights", "coefficients", "row", "previous", "noise",
           "out", "denoised", "numel", "num_predictions", "dtype", "stream");
    define(module, "scale_and_filter", &scale, "x", "scale", "out", "numel", "dtype", "out_dtype", "stream");
    define(module, "unscale_and_filter", &unscale, "x", "scale", "add", "out", "numel", "dtype", "add_dtype",
           "out_dtype", "stream");
    define(module, "unscale_grads", &unscale_grads, "table", "scales", "norm", "nonfinite", "workspace", "tensors",
           "scale_stride", "stream");
    module.def(
        "unscale_grads_workspace", [](uintptr_t, int64_t) { return 0; }, arg("table"), arg("tensors"),
        "Bytes of workspace: none, the CPU kernel allocates its own.");
    define(module, "ada_layer_norm_forward", &ada_forward, "x", "scale", "shift", "out", "statistics", "batch", "rows",
           "d", "scale_stride", "shift_stride", "eps", "dtype", "parameter_dtype", "stream");
    define(module, "ada_layer_norm_backward", &ada_backward, "grad_out", "x", "scale", "statistics", "grad_x",
           "grad_scale", "grad_shift", "workspace", "batch", "rows", "d", "scale_stride", "dtype", "parameter_dtype",
           "stream");
    define(module, "gated_residual_ada_layer_norm_forward", &gated_forward, "x", "y", "gate", "scale", "shift", "r",
           "out", "statistics", "batch", "rows", "d", "gate_stride", "scale_stride", "shift_stride", "eps", "dtype",
           "parameter_dtype", "stream");
    define(module, "gated_residual_ada_layer_norm_backward", &gated_backward, "grad_r", "grad_out", "r", "y", "gate",
           "scale", "statistics", "grad_x", "grad_y", "grad_gate", "grad_scale", "grad_shift", "workspace", "batch",
           "rows", "d", "gate_stride", "scale_stride", "dtype", "parameter_dtype", "stream");
    define(module, "residual_layer_norm_forward", &residual_forward, "x", "y", "weight", "bias", "r", "out",
           "statistics", "rows", "d", "eps", "dtype", "weight_dtype");
    define(module, "residual_layer_norm_backward", &residual_backward, "grad_r", "grad_out", "r", "weight",
           "statistics", "grad_x", "grad_weight", "grad_bias", "rows", "d", "dtype", "weight_dtype");
    for (const char *name : {"ada_layer_norm_workspace", "gated_residual_ada_layer_norm_workspace"})
        module.def(
            name, [](int64_t, int64_t, int64_t) { return 0; }, arg("batch"), arg("rows"), arg("d"),
            "Bytes of workspace for the backward pass: none, the CPU kernels allocate their own.");
    define(module, "geglu_forward", &gate_forward<&Kernels::geglu_forward>, "h", "y", "rows", "features", "row_stride",
           "dtype", "stream");
    define(module, "geglu_backward", &gate_backward<&Kernels::geglu_backward>, "h", "grad_y", "grad_h", "rows",
           "features", "row_stride", "dtype", "stream");
    define(module, "swiglu_forward", &gate_forward<&Kernels::swiglu_forward>, "h", "y", "rows", "features",
           "row_stride", "dtype", "stream");
    define(module, "swiglu_backward", &gate_backward<&Kernels::swiglu_backward>, "h", "grad_y", "grad_h", "rows",
           "features", "row_stride", "dtype", "stream");
    define(module, "rms_norm_forward", &rms_norm_forward, "x", "weight", "y", "rstd", "rows", "features", "row_stride",
           "eps", "dtype", "weight_dtype", "stream");
    define(module, "rms_norm_backward", &rms_norm_backward, "grad_y", "x", "weight", "rstd", "grad_x", "grad_weight",
           "rows", "features", "row_stride", "dtype", "weight_dtype", "stream");
    define(module, "attention", &attention, "q", "k", "v", "bias", "out", "q_batch", "q_token", "q_head", "k_batch",
           "k_token", "k_head", "v_batch", "v_token", "v_head", "batch", "heads", "queries", "keys", "head_dim",
           "scale");
    define(module, "folded_attention", &folded_attention, "x", "packed_keys", "packed_values", "bias", "out_bias", "y",
           "batch", "tokens", "dim", "heads", "keys");
    define(module, "pack_linear", &pack_linear, "weight", "packed", "row_stride", "depth", "width", "gated");
    define(module, "linear", &linear, "x", "packed", "bias", "add", "y", "rows", "row_stride", "depth", "width",
           "gated", "gelu");
    define(module, "pack_winograd", &pack_winograd, "weight", "packed", "channels", "out");
    define(module, "winograd", &winograd, "x", "packed", "bias", "y", "batch", "height", "width", "channels", "out");
    define(module, "qk_norm_forward", &normalise, "parts", "count", "batch", "heads", "head_dim", "eps", "dtype",
           "weight_dtype", "stream");
    define(module, "qk_norm_backward", &normalise_backward, "parts", "workspace", "count", "batch", "heads", "head_dim",
           "eps", "dtype", "weight_dtype", "stream");
    module.def(
        "qk_norm_workspace", [](int64_t) { return 0; }, arg("head_dim"),
        "Bytes of workspace: none, the CPU kernels allocate their own.");
}
