// The Python module kolors_fast._cpu: argument checks and exports only. Tensors arrive as addresses, 0 for absent ones.
#include "common/arguments.h"
#include "cpu/isa.h"

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

namespace py = pybind11;
using namespace kolors_fast;

namespace {

template <typename Element = void> Element *pointer(uintptr_t address) { return reinterpret_cast<Element *>(address); }

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

void forward(uintptr_t x, uintptr_t skip, uintptr_t weight, uintptr_t bias, uintptr_t channel_add, uintptr_t y,
             uintptr_t mean, uintptr_t rstd, uintptr_t, int64_t n, int64_t c, int64_t c_skip, int64_t hw,
             int64_t groups, double eps, bool silu, bool channels_last, int dtype, int weight_dtype, uintptr_t) {
    const GroupNormSiluShape shape = checked_shape(n, c, c_skip, hw, groups, silu, channels_last, dtype, weight_dtype);
    const py::gil_scoped_release released;
    kernels().group_norm_silu_forward({shape, pointer(x), pointer(skip), pointer(weight), pointer(bias),
                                       pointer(channel_add), pointer(y), pointer<float>(mean), pointer<float>(rstd),
                                       eps});
}

void backward(uintptr_t grad_y, uintptr_t x, uintptr_t skip, uintptr_t weight, uintptr_t bias, uintptr_t channel_add,
              uintptr_t mean, uintptr_t rstd, uintptr_t grad_x, uintptr_t grad_skip, uintptr_t grad_weight,
              uintptr_t grad_bias, uintptr_t grad_channel_add, uintptr_t, int64_t n, int64_t c, int64_t c_skip,
              int64_t hw, int64_t groups, bool silu, bool channels_last, int dtype, int weight_dtype, uintptr_t) {
    const GroupNormSiluShape shape = checked_shape(n, c, c_skip, hw, groups, silu, channels_last, dtype, weight_dtype);
    const py::gil_scoped_release released;
    kernels().group_norm_silu_backward({shape, pointer(grad_y), pointer(x), pointer(skip), pointer(weight),
                                        pointer(bias), pointer(channel_add), pointer<float>(mean), pointer<float>(rstd),
                                        pointer(grad_x), pointer(grad_skip), pointer<float>(grad_weight),
                                        pointer<float>(grad_bias), pointer<float>(grad_channel_add)});
}

void step(uintptr_t sample, uintptr_t predictions, uintptr_t weights, uintptr_t coefficients, uintptr_t row,
          uintptr_t previous, uintptr_t noise, uintptr_t out, uintptr_t denoised, int64_t numel, int num_predictions,
          int dtype, uintptr_t) {
    if (numel < 0 || num_predictions < 0)
        throw py::value_error("numel and num_predictions must not be negative");
    const DType type = dtype_of("dtype", dtype);
    const py::gil_scoped_release released;
    kernels().guided_step({pointer(sample), pointer(predictions), pointer<float>(weights), pointer<float>(coefficients),
                           pointer<int64_t>(row), pointer(previous), pointer(noise), pointer(out), pointer(denoised),
                           numel, num_predictions, type});
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
    module.def("group_norm_silu_forward", &forward, arg("x"), arg("skip"), arg("weight"), arg("bias"),
               arg("channel_add"), arg("y"), arg("mean"), arg("rstd"), arg("workspace"), arg("n"), arg("c"),
               arg("c_skip"), arg("hw"), arg("groups"), arg("eps"), arg("silu"), arg("channels_last"), arg("dtype"),
               arg("weight_dtype"), arg("stream"));
    module.def("group_norm_silu_backward", &backward, arg("grad_y"), arg("x"), arg("skip"), arg("weight"), arg("bias"),
               arg("channel_add"), arg("mean"), arg("rstd"), arg("grad_x"), arg("grad_skip"), arg("grad_weight"),
               arg("grad_bias"), arg("grad_channel_add"), arg("workspace"), arg("n"), arg("c"), arg("c_skip"),
               arg("hw"), arg("groups"), arg("silu"), arg("channels_last"), arg("dtype"), arg("weight_dtype"),
               arg("stream"));
    module.def(
        "group_norm_silu_workspace", [](int64_t, int64_t, int64_t, int64_t, bool, bool) { return 0; }, arg("n"),
        arg("c_total"), arg("hw"), arg("groups"), arg("channels_last"), arg("backward"),
        "Bytes of workspace: none, the CPU kernels allocate their own.");
    module.def("guided_step", &step, arg("sample"), arg("predictions"), arg("weights"), arg("coefficients"), arg("row"),
               arg("previous"), arg("noise"), arg("out"), arg("denoised"), arg("numel"), arg("num_predictions"),
               arg("dtype"), arg("stream"));
}
