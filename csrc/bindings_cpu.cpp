// The Python module kolors_fast._cpu: argument checks and exports only. Tensors arrive as addresses, 0 for absent ones.
#include "common/arguments.h"
#include "common/bindings.h"
#include "cpu/isa.h"

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

} // namespace

PYBIND11_MODULE(_cpu, module) {
    using py::arg;
    module.doc() = "CPU kernels of kolors_fast. Tensors are addresses (0: absent); dtypes are 0 float32, 1 float16, "
                   "2 bfloat16. workspace and stream are for the GPU and ignored.";
    module.def("isa", &isa, "The instruction set in use: avx512, avx2 or generic (KOLORS_FAST_CPU_ISA forces one).");
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
    define(module, "qk_norm_forward", &normalise, "parts", "count", "batch", "heads", "head_dim", "eps", "dtype",
           "weight_dtype", "stream");
    define(module, "qk_norm_backward", &normalise_backward, "parts", "workspace", "count", "batch", "heads", "head_dim",
           "eps", "dtype", "weight_dtype", "stream");
    module.def(
        "qk_norm_workspace", [](int64_t) { return 0; }, arg("head_dim"),
        "Bytes of workspace: none, the CPU kernels allocate their own.");
}
