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
PYTHON(PyObject*, PyTuple_GetItem, PyObject*, std::ptrdiff_t);
PYTHON(std::ptrdiff_t, PyTuple_Size, PyObject*);
PYTHON(char*, PyBytes_AsString, PyObject*);
PYTHON(int, PyDict_Next, PyObject*, std::ptrdiff_t*, PyObject**, PyObject**);
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

// `snapshot` is a tuple: modules, their classes; dictionaries, how many entries each had, and the addresses of all keys
// and values in order; classes, names and what class.name was, three each; tensors, with version and address each. The
// first dictionary is `own`, the block's, which a snapshot that the block holds must not hold in turn.
FUSED_CNN_EXPORT bool fused_cnn_unchanged(PyObject* snapshot, PyObject* own) try {
  const auto item = [](PyObject* tuple, std::ptrdiff_t i) { return PyTuple_GetItem(tuple, i); };
  PyObject* const modules = item(snapshot, 0);
  PyObject* const classes = item(snapshot, 1);
  for (std::ptrdiff_t i = 0, n = PyTuple_Size(modules); i < n; ++i) {
    if (!is(PyObject_Type(item(modules, i)), item(classes, i))) return false;
  }
  PyObject* const dictionaries = item(snapshot, 2);
  const auto* counts = reinterpret_cast<const int64_t*>(PyBytes_AsString(item(snapshot, 3)));
  const auto* entries = reinterpret_cast<PyObject* const*>(PyBytes_AsString(item(snapshot, 4)));
  for (std::ptrdiff_t i = 0, n = PyTuple_Size(dictionaries); i <= n; ++i) {
    PyObject *dictionary = i == 0 ? own : item(dictionaries, i - 1), *key, *value;
    std::ptrdiff_t position = 0;
    int64_t left = counts[i];
    for (; PyDict_Next(dictionary, &position, &key, &value); entries += 2, --left) {
      if (left == 0 || key != entries[0] || value != entries[1]) return false;
    }
    if (left != 0) return false;
  }
  PyObject* const attributes = item(snapshot, 5);
  for (std::ptrdiff_t i = 0, n = PyTuple_Size(attributes); i < n; i += 3) {
    if (!is(PyObject_GetAttr(item(attributes, i), item(attributes, i + 1)), item(attributes, i + 2))) return false;
  }
  PyObject* const tensors = item(snapshot, 6);
  const auto* states = reinterpret_cast<const int64_t*>(PyBytes_AsString(item(snapshot, 7)));
  for (std::ptrdiff_t i = 0, n = PyTuple_Size(tensors); i < n; ++i, states += 2) {
    auto* const tensor = reinterpret_cast<void**>(reinterpret_cast<char*>(item(tensors, i)) + held_at);
    void* data;
    if (tensor_version(tensor) != states[0]) return false;
    if (aoti_torch_get_data_ptr(reinterpret_cast<AtenTensorHandle>(tensor), &data) != 0) return false;
    if (reinterpret_cast<int64_t>(data) != states[1]) return false;
  }
  return true;
} catch (...) {
  return false;  // a tensor that has no version
}
