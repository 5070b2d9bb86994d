// fused_cnn_unchanged(): whether modules and tensors are what they were when a snapshot of them was taken
// (fused_cnn/nn/snapshot.py takes it). Asked at every call of a fused block, where Python's own attribute look-ups
// would take ten times as long. It runs under the interpreter's lock and calls what CPython keeps stable (the limited
// API), found in the process that loads this library: one without Python never asks.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <cstddef>
#include <cstdint>
#include "cpu/level.h"

extern "C" {
struct PyObject;
#define PYTHON(result, name, ...) __attribute__((weak)) result name(__VA_ARGS__)
PYTHON(int, PyDict_Next, PyObject*, std::ptrdiff_t*, PyObject**, PyObject**);
PYTHON(std::ptrdiff_t, PyDict_Size, PyObject*);
PYTHON(PyObject*, PyDict_GetItemWithError, PyObject*, PyObject*);
PYTHON(PyObject*, PyObject_Type, PyObject*);
PYTHON(PyObject*, PyObject_GetAttr, PyObject*, PyObject*);
PYTHON(void, PyErr_Clear);
PYTHON(void, Py_DecRef, PyObject*);
#undef PYTHON
}

// at::TensorBase::_version(), for which PyTorch's C interface has no name; absent where it is called otherwise.
extern "C" __attribute__((weak)) int64_t tensor_version(void* const* tensor) asm("_ZNK2at10TensorBase8_versionEv");

namespace {

int64_t held_at = 0;  // where Python's object of a tensor holds the one pointer that an at::Tensor is, in bytes

// Whether `object` is, in identity, the one that was recorded; takes over the reference.
bool is(PyObject* object, PyObject* recorded) {
  if (object == nullptr) PyErr_Clear();
  if (object != nullptr) Py_DecRef(object);
  return object == recorded;
}

}  // namespace

// Finds out where Python's objects of tensors hold PyTorch's, from one of them, `size` bytes long, and the address that
// its `_cdata` gives. False where that cannot be found: then tensors cannot be asked from here.
FUSED_CNN_EXPORT bool fused_cnn_find_tensors(const char* object, const void* held, int64_t size) {
  if (tensor_version == nullptr) return false;
  for (int64_t at = 2 * sizeof(void*); at + int64_t{sizeof(void*)} <= size; at += sizeof(void*)) {
    if (*reinterpret_cast<const void* const*>(object + at) == held) held_at = at;
  }
  return held_at > 0;
}

// `snapshot` holds addresses and numbers, each group behind its length: modules with their classes; entries of
// dictionaries, each a dictionary, a key and a value, or 0 where there is none; dictionaries in full, each with its
// length, its keys and values in order; classes with the names and values of attributes; tensors with their versions
// and memory. Whoever took it keeps all these objects alive. A dictionary 0 is `own`, the block's: a snapshot that the
// block holds cannot hold it in turn.
FUSED_CNN_EXPORT bool fused_cnn_unchanged(const int64_t* snapshot, PyObject* own) try {
  const auto next = [&snapshot] { return *snapshot++; };
  const auto object = [&snapshot] { return reinterpret_cast<PyObject*>(*snapshot++); };
  for (int64_t n = next(); n > 0; --n) {
    PyObject* const module = object();
    if (!is(PyObject_Type(module), object())) return false;
  }
  for (int64_t n = next(); n > 0; --n) {
    PyObject* const dictionary = object();
    PyObject* const key = object();
    if (PyDict_GetItemWithError(dictionary == nullptr ? own : dictionary, key) != object()) return false;
  }
  for (int64_t n = next(); n > 0; --n) {
    PyObject* const dictionary = object();
    const int64_t size = next();
    if (PyDict_Size(dictionary) != size) return false;
    PyObject *key, *value;
    std::ptrdiff_t position = 0;
    for (int64_t i = 0; i < size && PyDict_Next(dictionary, &position, &key, &value); ++i) {
      if (key != object() || value != object()) return false;
    }
  }
  for (int64_t n = next(); n > 0; --n) {
    PyObject* const holder = object();
    PyObject* const name = object();
    if (!is(PyObject_GetAttr(holder, name), object())) return false;
  }
  for (int64_t n = next(); n > 0; --n) {
    auto* const tensor = reinterpret_cast<void**>(reinterpret_cast<char*>(object()) + held_at);
    void* data;
    if (tensor_version(tensor) != next()) return false;
    if (aoti_torch_get_data_ptr(reinterpret_cast<AtenTensorHandle>(tensor), &data) != 0) return false;
    if (reinterpret_cast<int64_t>(data) != next()) return false;
  }
  return true;
} catch (...) {
  return false;  // a tensor that has no version
}
