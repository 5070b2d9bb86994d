// Defines the ops in a process without Python, so that what loads this library there (AOTInductor, libtorch) can run
// saved graphs that call them. Where Python runs, it defines them itself: its definitions carry tags, which PyTorch's
// stable interface does not know, and fake kernels, and they are there when this library is not. A fragment, as the
// namespace is Python's then. An interpreter that starts after this library was loaded finds the ops taken, and the
// import of fused_cnn says so.
#include <torch/csrc/stable/library.h>
#include <exception>

// Found in the process that loads this library, or null.
extern "C" __attribute__((weak)) int Py_IsInitialized();

namespace fused_cnn {
extern const char* const schemas[];  // ends with a null pointer
}

STABLE_TORCH_LIBRARY_FRAGMENT(fused_cnn, m) {
  if (Py_IsInitialized != nullptr && Py_IsInitialized() != 0) return;
  try {
    for (const char* const* schema = fused_cnn::schemas; *schema != nullptr; ++schema) m.def(*schema);
  } catch (const std::exception&) {
    // Another copy of this library was first. An exception here would end the process.
  }
}
