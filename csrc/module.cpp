// The Python module fused_cnn._C: facts about this build. Importing it also registers the CPU kernels with PyTorch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <array>
#include "common/cpu_conv.h"
#include "common/cpu_level.h"

namespace py = pybind11;

namespace {

int64_t packed_bytes_read(std::array<int64_t, 4> x, int64_t out_channels, fused_cnn::Ints kernel,
                          fused_cnn::Ints stride, fused_cnn::Ints padding, fused_cnn::Ints dilation, bool bfloat16,
                          bool in_place) {
  using namespace fused_cnn;
  const engine::ConvShape shape =
      engine_shape(x[0], x[1], x[2], x[3], out_channels, kernel, {stride, padding, dilation, 1});
  return engine::packed_bytes_read(shape, bfloat16 ? engine::DType::bf16 : engine::DType::f32, in_place);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Facts about this build of fused_cnn; loading it registers the CPU kernels.";
  py::dict info;
  info["compiler"] = FUSED_CNN_BUILD_COMPILER;
  info["torch"] = FUSED_CNN_BUILD_TORCH;
  info["sources"] = FUSED_CNN_BUILD_SOURCES;
  info["cpu_levels"] = FUSED_CNN_BUILD_CPU_LEVELS;
  info["cpu_level"] = fused_cnn::cpu_level_name();
  info["cuda"] = FUSED_CNN_BUILD_CUDA;
  info["cutlass"] = FUSED_CNN_BUILD_CUTLASS;
  info["cuda_archs"] = FUSED_CNN_BUILD_CUDA_ARCHS;
  m.attr("build_info") = info;
  m.def("set_cpu_level", &fused_cnn::set_cpu_level, py::arg("name"),
        "Use a lower instruction set from now on, for tests; False where this processor lacks it.");
  m.def("packed_bytes_read", &packed_bytes_read, py::arg("x_shape"), py::arg("out_channels"), py::arg("kernel"),
        py::arg("stride"), py::arg("padding"), py::arg("dilation"), py::arg("bfloat16"), py::arg("in_place"),
        "Bytes of its packed weight that a convolution reads: it may hold the weight in two forms.");
}
