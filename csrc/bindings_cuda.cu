// kolors_fast._cuda: the CUDA launchers, with every pointer and the stream as a Python integer (0 = absent).
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "common/bindings.h"
#include "cuda/ada_layer_norm.cuh"
#include "cuda/gated_residual_ada_layer_norm.cuh"
#include "cuda/group_norm_silu.cuh"
#include "cuda/group_norm_silu_backward.cuh"
#include "cuda/guided_step.cuh"
#include "cuda/qk_norm.cuh"
#include "cuda/scale_and_filter.cuh"
#include "cuda/unscale_and_filter.cuh"
#include "cuda/unscale_grads.cuh"

namespace py = pybind11;
using kolors_fast::Argument;
using kolors_fast::from_argument;

namespace {

template <typename... T, typename... Names>
void define(py::module_ &m, const char *name, cudaError_t (*launch)(T...), Names... names) {
    static_assert(sizeof...(T) == sizeof...(Names), "one name per argument");
    const auto call = [name, launch](Argument<T>... arguments) {
        const cudaError_t error = launch(from_argument<T>(arguments)...);
        if (error != cudaSuccess)
            throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(error));
    };
    // a full launch queue blocks: other Python threads go on meanwhile
    m.def(name, call, py::call_guard<py::gil_scoped_release>(), py::arg(names)...);
}

} // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "CUDA kernels of kolors_fast: raw pointers in, dtype codes 0 fp32, 1 fp16, 2 bf16, stream last.";
    define(m, "group_norm_silu_forward", &kolors_fast::group_norm_silu_forward, "x", "skip", "weight", "bias",
           "channel_add", "y", "mean", "rstd", "workspace", "n", "c", "c_skip", "hw", "groups", "eps", "silu",
           "channels_last", "dtype", "weight_dtype", "stream");
    define(m, "group_norm_silu_backward", &kolors_fast::group_norm_silu_backward, "grad_y", "x", "skip", "weight",
           "bias", "channel_add", "mean", "rstd", "grad_x", "grad_skip", "grad_weight", "grad_bias", "grad_channel_add",
           "workspace", "n", "c", "c_skip", "hw", "groups", "silu", "channels_last", "dtype", "weight_dtype", "stream");
    define(m, "guided_step", &kolors_fast::guided_step, "sample", "predictions", "weights", "coefficients", "row",
           "previous", "noise", "out", "denoised", "numel", "num_predictions", "dtype", "stream");
    define(m, "ada_layer_norm_forward", &kolors_fast::ada_layer_norm_forward, "x", "scale", "shift", "out",
           "statistics", "batch", "rows", "d", "scale_stride", "shift_stride", "eps", "dtype", "parameter_dtype",
           "stream");
    define(m, "ada_layer_norm_backward", &kolors_fast::ada_layer_norm_backward, "grad_out", "x", "scale", "statistics",
           "grad_x", "grad_scale", "grad_shift", "workspace", "batch", "rows", "d", "scale_stride", "dtype",
           "parameter_dtype", "stream");
    define(m, "gated_residual_ada_layer_norm_forward", &kolors_fast::gated_residual_ada_layer_norm_forward, "x", "y",
           "gate", "scale", "shift", "r", "out", "statistics", "batch", "rows", "d", "gate_stride", "scale_stride",
           "shift_stride", "eps", "dtype", "parameter_dtype", "stream");
    define(m, "gated_residual_ada_layer_norm_backward", &kolors_fast::gated_residual_ada_layer_norm_backward, "grad_r",
           "grad_out", "r", "y", "gate", "scale", "statistics", "grad_x", "grad_y", "grad_gate", "grad_scale",
           "grad_shift", "workspace", "batch", "rows", "d", "gate_stride", "scale_stride", "dtype", "parameter_dtype",
           "stream");
    m.def("ada_layer_norm_workspace", &kolors_fast::ada_layer_norm_workspace, py::arg("batch"), py::arg("rows"),
          py::arg("d"),
          "Bytes of workspace that a backward pass on the current device needs; its contents do not matter.");
    m.def("gated_residual_ada_layer_norm_workspace", &kolors_fast::gated_residual_ada_layer_norm_workspace,
          py::arg("batch"), py::arg("rows"), py::arg("d"), "As ada_layer_norm_workspace, with the sums for the gate.");
    m.def("group_norm_silu_workspace", &kolors_fast::group_norm_silu_workspace, py::arg("n"), py::arg("c_total"),
          py::arg("hw"), py::arg("groups"), py::arg("channels_last"), py::arg("backward"),
          "Bytes of workspace that a call on the current device needs; its contents do not matter.");
    define(m, "scale_and_filter", &kolors_fast::scale_and_filter, "x", "scale", "out", "numel", "dtype", "out_dtype",
           "stream");
    define(m, "unscale_and_filter", &kolors_fast::unscale_and_filter, "x", "scale", "add", "out", "numel", "dtype",
           "add_dtype", "out_dtype", "stream");
    define(m, "unscale_grads", &kolors_fast::unscale_grads, "table", "scales", "norm", "nonfinite", "workspace",
           "tensors", "scale_stride", "stream");
    m.def(
        "unscale_grads_workspace",
        [](uintptr_t table, int64_t tensors) {
            return kolors_fast::unscale_grads_workspace(from_argument<const kolors_fast::TensorEntry *>(table),
                                                        tensors);
        },
        py::arg("table"), py::arg("tensors"), "Bytes of workspace for this table; its contents do not matter.");
    define(m, "qk_norm_forward", &kolors_fast::qk_norm_forward, "parts", "count", "batch", "heads", "head_dim", "eps",
           "dtype", "weight_dtype", "stream");
    define(m, "qk_norm_backward", &kolors_fast::qk_norm_backward, "parts", "workspace", "count", "batch", "heads",
           "head_dim", "eps", "dtype", "weight_dtype", "stream");
    m.def("qk_norm_workspace", &kolors_fast::qk_norm_workspace, py::arg("head_dim"),
          "Bytes of workspace that a backward pass on the current device needs; its contents do not matter.");
}
