// The Python module fused_cnn._C: facts about this build. Importing it also registers the CPU kernels with PyTorch.
#include <pybind11/pybind11.h>
#include "common/cpu_level.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Facts about this build of fused_cnn; loading it registers the CPU kernels.";
  py::dict info;
  info["compiler"] = FUSED_CNN_BUILD_COMPILER;
  info["torch"] = FUSED_CNN_BUILD_TORCH;
  info["cpu_levels"] = FUSED_CNN_BUILD_CPU_LEVELS;
  info["cpu_level"] = fused_cnn::cpu_level_name();
  info["cuda"] = FUSED_CNN_BUILD_CUDA;
  info["cuda_archs"] = FUSED_CNN_BUILD_CUDA_ARCHS;
  m.attr("build_info") = info;
  m.def("set_cpu_level", &fused_cnn::set_cpu_level, py::arg("name"),
        "Use a lower instruction set from now on, for tests; False where this processor lacks it.");
}
