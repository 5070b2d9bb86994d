// Runs a package of fused_cnn.plan.export.package's without Python: loads fused_cnn's library, which brings the ops,
// and with it the package; runs it on inputs that torch.save wrote and compares with the result that it wrote.
//
//   run_package PACKAGE.pt2 INPUTS.pt RESULT.pt [_C.so]
//
// It is compiled against PyTorch alone (`torch` is the folder of an installed torch):
//   g++ -std=c++20 -O1 run_package.cpp -o run_package -isystem torch/include -isystem torch/include/torch/csrc/api/include
//       -Ltorch/lib -Wl,-rpath,torch/lib -Wl,--no-as-needed -ltorch -ltorch_cpu -lc10 -ldl
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <stdexcept>

namespace {

c10::IValue saved(const char* path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(std::string(path) + " cannot be read");
  return torch::pickle_load({std::istreambuf_iterator<char>(file), {}});
}

// The instruction set that the library's kernels use here.
std::string load_library(const char* path) {
  void* const library = dlopen(path, RTLD_NOW);
  if (library == nullptr) throw std::runtime_error(dlerror());
  const auto level = reinterpret_cast<const char* (*)()>(dlsym(library, "fused_cnn_cpu_level"));
  if (level == nullptr) throw std::runtime_error(std::string(path) + " is not fused_cnn's library for the CPU");
  return level();
}

void run(const char* package, const char* inputs, const char* result, const char* library) {
  const std::string level = library == nullptr ? "" : load_library(library);
  torch::inductor::AOTIModelPackageLoader model(package);
  const std::string packed_for = model.get_metadata()["fused_cnn_cpu_level"];
  if (packed_for != level) {
    throw std::runtime_error("its weights are packed for " + packed_for + ", and this processor has " + level);
  }
  const at::Tensor out = model.run(saved(inputs).toTensorVector()).at(0);
  const at::Tensor expected = saved(result).toTensor();
  const double scale = expected.abs().max().item<double>();
  const double error = (out - expected).abs().max().item<double>() / scale;
  std::printf("a result of %lld elements; the largest difference is %.1e of the largest element\n",
              static_cast<long long>(out.numel()), error);
  if (!(error <= 1e-5)) throw std::runtime_error("the result is another than the saved one");
}

}  // namespace

int main(int count, char** arguments) try {
  if (count != 4 && count != 5) {
    std::fprintf(stderr, "usage: %s PACKAGE.pt2 INPUTS.pt RESULT.pt [_C.so]\n", arguments[0]);
    return 2;
  }
  run(arguments[1], arguments[2], arguments[3], count == 5 ? arguments[4] : nullptr);
  return 0;
} catch (const c10::Error& error) {
  std::fprintf(stderr, "run_package: %s\n", error.what_without_backtrace());
  return 1;
} catch (const std::exception& error) {
  std::fprintf(stderr, "run_package: %s\n", error.what());
  return 1;
}
