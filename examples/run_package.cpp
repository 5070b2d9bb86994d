// Runs a package of fused_cnn.plan.export.package's without Python: loads fused_cnn's library, which brings the ops,
// and with it the package; runs it on a list of inputs that torch.save wrote and compares with a list of results.
//
//   run_package PACKAGE.pt2 INPUTS.pt RESULTS.pt [_C.so]
//
// It is compiled against PyTorch alone (`torch` is the folder of an installed torch):
//   g++ -std=c++20 -O1 -isystem torch/include -isystem torch/include/torch/csrc/api/include run_package.cpp
//       -o run_package -Ltorch/lib -Wl,-rpath,torch/lib -ltorch_cpu -lc10 -ldl
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <stdexcept>

namespace {

// A list of tensors that torch.save wrote.
std::vector<at::Tensor> saved(const char* path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(std::string(path) + " cannot be read");
  std::vector<at::Tensor> found;
  const c10::IValue list = torch::jit::pickle_load({std::istreambuf_iterator<char>(file), {}});
  for (const c10::IValue& item : list.toListRef()) found.push_back(item.toTensor());
  return found;
}

// The instruction set that the library's kernels use here.
std::string load_library(const char* path) {
  void* const library = dlopen(path, RTLD_NOW);
  if (library == nullptr) throw std::runtime_error(dlerror());
  const auto level = reinterpret_cast<const char* (*)()>(dlsym(library, "fused_cnn_cpu_level"));
  if (level == nullptr) throw std::runtime_error(std::string(path) + " is not fused_cnn's library for the CPU");
  return level();
}

void run(const char* package, const char* inputs, const char* results, const char* library) {
  const std::string level = library == nullptr ? "" : load_library(library);
  torch::inductor::AOTIModelPackageLoader model(package);
  const std::string packed_for = model.get_metadata()["fused_cnn_cpu_level"];
  if (packed_for != level) {
    throw std::runtime_error("its weights are packed for " + packed_for + ", and this processor has " + level);
  }
  const std::vector<at::Tensor> made = model.run(saved(inputs)), expected = saved(results);
  if (made.size() != expected.size()) throw std::runtime_error("it has another number of results than were saved");
  for (size_t i = 0; i < made.size(); ++i) {
    const double scale = expected[i].abs().max().item<double>();
    const double error = made[i].sub(expected[i]).abs().max().item<double>() / scale;
    std::printf("result %zu: %lld elements, which differ by %.1e of the largest at most\n", i,
                static_cast<long long>(made[i].numel()), error);
    if (!(error <= 1e-5)) throw std::runtime_error("the result is another than the saved one");
  }
}

}  // namespace

int main(int count, char** arguments) try {
  if (count != 4 && count != 5) {
    std::fprintf(stderr, "usage: %s PACKAGE.pt2 INPUTS.pt RESULTS.pt [_C.so]\n", arguments[0]);
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
