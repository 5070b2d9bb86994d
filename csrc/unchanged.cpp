// Two functions of Python's: unchanged(), whether modules and tensors are what they were when a snapshot of them was
// taken (fused_cnn/nn/snapshot.py takes it), asked at every call of a fused block, where Python's own attribute
// look-ups would take ten times as long; and states(), what of tensors is recorded. They run under the interpreter's
// lock and call what CPython keeps stable (the limited API), found in the process that loads this library: one without
// Python never asks.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include "cpu/level.h"

extern "C" {
struct PyObject;
struct PyMethodDef {  // the interpreter's description of a function that takes its arguments as an array
  const char* name;
  PyObject* (*call)(PyObject* self, PyObject* const* arguments, std::ptrdiff_t count);
  int flags;
  const char* doc;
};
#define PYTHON(result, name, ...) __attribute__((weak)) result name(__VA_ARGS__)
PYTHON(int, PyDict_Next, PyObject*, std::ptrdiff_t*, PyObject**, PyObject**);
PYTHON(std::ptrdiff_t, PyDict_Size, PyObject*);
PYTHON(PyObject*, PyDict_GetItemWithError, PyObject*, PyObject*);
PYTHON(PyObject*, PyObject_Type, PyObject*);
PYTHON(PyObject*, PyObject_GetAttr, PyObject*, PyObject*);
PYTHON(PyObject*, PyCFunction_NewEx, PyMethodDef*, PyObject*, PyObject*);
PYTHON(PyObject*, PyBool_FromLong, long);
PYTHON(const char*, PyBytes_AsString, PyObject*);
PYTHON(char*, PyByteArray_AsString, PyObject*);
PYTHON(PyObject*, PyBytes_FromStringAndSize, const char*, std::ptrdiff_t);
PYTHON(std::ptrdiff_t, PyTuple_Size, PyObject*);
PYTHON(PyObject*, PyTuple_GetItem, PyObject*, std::ptrdiff_t);
PYTHON(void, PyErr_Clear);
PYTHON(void, Py_DecRef, PyObject*);
#undef PYTHON
}

// at::TensorBase::_version(), for which PyTorch's C interface has no name; absent where it is called otherwise.
extern "C" __attribute__((weak)) int64_t tensor_version(AtenTensorHandle tensor) asm("_ZNK2at10TensorBase8_versionEv");

namespace {

// Where Python's objects hold these, in bytes: their class, the one pointer that an at::Tensor is, and a dictionary's
// length.
int64_t class_at = 0, tensor_at = 0, length_at = 0;

// Whether `object` is, in identity, the one that was recorded; takes over the reference.
bool is(PyObject* object, PyObject* recorded) {
  if (object == nullptr) PyErr_Clear();
  if (object != nullptr) Py_DecRef(object);
  return object == recorded;
}

int64_t word(const PyObject* object, int64_t at) {
  return *reinterpret_cast<const int64_t*>(reinterpret_cast<const char*>(object) + at);
}

// What `dictionary` holds under `key`, or null. `position` is where this very key was found last, and is asked first,
// which takes a third of a look-up's time; -1 where the key has gone, or an equal one stands for it.
PyObject* held(PyObject* dictionary, PyObject* key, int64_t& position) {
  if (position >= 0) {
    PyObject *found, *value;
    std::ptrdiff_t at = position;
    if (PyDict_Next(dictionary, &at, &found, &value) && found == key) return value;
    position = -1;
    for (std::ptrdiff_t from = at = 0; PyDict_Next(dictionary, &at, &found, &value); from = at) {
      if (found == key) position = from;
    }
  }
  return PyDict_GetItemWithError(dictionary, key);
}

// What is recorded of a tensor, all of it in words of 64 bits.
struct State {
  int64_t object, version, data;
  int64_t layout;              // sizes and strides, hashed
  int64_t is_readable, first;  // whether the processor can look into its memory, and the first word there
};

constexpr int64_t kElements = sizeof(int64_t);  // so many fill a word in every dtype

AtenTensorHandle tensor_of(int64_t object) {
  return reinterpret_cast<AtenTensorHandle>(reinterpret_cast<char*>(object) + tensor_at);
}

const void* data_of(AtenTensorHandle tensor) {
  void* data = nullptr;
  return aoti_torch_get_data_ptr(tensor, &data) == 0 ? data : nullptr;
}

// Sizes and strides in one number; the same for all tensors that have none, as sparse ones.
int64_t layout_of(AtenTensorHandle tensor) {
  int64_t dims = 0, *sizes = nullptr, *strides = nullptr;
  if (aoti_torch_get_dim(tensor, &dims) != 0 || aoti_torch_get_sizes(tensor, &sizes) != 0 ||
      aoti_torch_get_strides(tensor, &strides) != 0) {
    return -1;
  }
  uint64_t hash = 0;
  for (int64_t i = 0; i < dims; ++i) {
    for (const int64_t each : {sizes[i], strides[i]}) hash = (hash + uint64_t(each)) * 0x9E3779B97F4A7C15;
  }
  return static_cast<int64_t>(hash);
}

int64_t first_word(const void* data) {
  int64_t word;
  std::memcpy(&word, data, sizeof word);
  return word;
}

State state_of(PyObject* object) try {
  State state{reinterpret_cast<int64_t>(object)};
  const AtenTensorHandle tensor = tensor_of(state.object);
  const void* const data = data_of(tensor);
  int32_t device = -1;
  int64_t elements = 0;
  aoti_torch_get_device_type(tensor, &device);
  aoti_torch_get_numel(tensor, &elements);
  state.data = reinterpret_cast<int64_t>(data);
  state.layout = layout_of(tensor);
  state.is_readable = data != nullptr && device == aoti_torch_device_type_cpu() && elements >= kElements;
  if (state.is_readable != 0) state.first = first_word(data);
  state.version = tensor_version(tensor);
  return state;
} catch (...) {  // an inference tensor, which has no version
  return {reinterpret_cast<int64_t>(object), -1};
}

// Whether a tensor is in the state that was recorded: as PyTorch counts changes, by how it lies, and by the first word
// of its memory, which shows most of those that PyTorch does not see.
bool holds(const State& state) {
  const AtenTensorHandle tensor = tensor_of(state.object);
  if (tensor_version(tensor) != state.version || layout_of(tensor) != state.layout) return false;
  const void* const data = data_of(tensor);
  return reinterpret_cast<int64_t>(data) == state.data && (state.is_readable == 0 || first_word(data) == state.first);
}

// `snapshot` holds addresses and numbers, each group behind its length: modules and tensors with their classes; entries
// of dictionaries, each a dictionary, a key and its value; dictionaries, each with a key that it has not; dictionaries
// in full, each with its length, its keys and values in order; classes with the names and values of attributes; the
// states of tensors. Whoever took it keeps all these objects alive. A dictionary 0 is `own`, the block's: a snapshot
// that the block holds cannot hold it in turn. `positions` has a number for each entry, which is this function's own.
bool unchanged(const int64_t* snapshot, int64_t* positions, PyObject* own) try {
  const auto next = [&snapshot] { return *snapshot++; };
  const auto object = [&snapshot] { return reinterpret_cast<PyObject*>(*snapshot++); };
  for (int64_t n = next(); n > 0; --n) {
    const PyObject* const each = object();
    if (word(each, class_at) != next()) return false;
  }
  for (int64_t n = next(); n > 0; --n) {
    PyObject* const dictionary = object();
    PyObject* const key = object();
    if (held(dictionary == nullptr ? own : dictionary, key, *positions++) != object()) return false;
  }
  for (int64_t n = next(); n > 0; --n) {
    PyObject* const dictionary = object();
    if (PyDict_GetItemWithError(dictionary == nullptr ? own : dictionary, object()) != nullptr) return false;
  }
  for (int64_t n = next(); n > 0; --n) {
    PyObject* const dictionary = object();
    const int64_t size = next();
    if (word(dictionary, length_at) != size) return false;
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
    if (!holds(*reinterpret_cast<const State*>(snapshot))) return false;
    snapshot += sizeof(State) / sizeof *snapshot;
  }
  return true;
} catch (...) {
  return false;  // a tensor that has no version
}

// unchanged(snapshot: bytes, positions: bytearray, own: dict) -> bool.
PyObject* call_unchanged(PyObject*, PyObject* const* arguments, std::ptrdiff_t) {
  const auto* const snapshot = reinterpret_cast<const int64_t*>(PyBytes_AsString(arguments[0]));
  auto* const positions = reinterpret_cast<int64_t*>(PyByteArray_AsString(arguments[1]));
  return PyBool_FromLong(unchanged(snapshot, positions, arguments[2]));
}

// states(tensors: tuple) -> bytes.
PyObject* call_states(PyObject*, PyObject* const* arguments, std::ptrdiff_t) {
  const std::ptrdiff_t count = PyTuple_Size(arguments[0]);
  PyObject* const result = PyBytes_FromStringAndSize(nullptr, count * std::ptrdiff_t{sizeof(State)});
  auto* const states = reinterpret_cast<State*>(const_cast<char*>(PyBytes_AsString(result)));
  for (std::ptrdiff_t i = 0; i < count; ++i) states[i] = state_of(PyTuple_GetItem(arguments[0], i));
  return result;
}

constexpr int kFastCall = 0x80;  // METH_FASTCALL
PyMethodDef functions[] = {{"unchanged", call_unchanged, kFastCall, nullptr},
                           {"states", call_states, kFastCall, nullptr}};

}  // namespace

// Finds out where Python's objects hold what is asked of them: a tensor, of which `_cdata` gives the address of
// PyTorch's, and two dictionaries of other lengths than each other's; all with the size of such an object in bytes.
// False where that cannot be found: then they cannot be asked from here.
FUSED_CNN_EXPORT bool fused_cnn_find(PyObject* tensor, int64_t cdata, int64_t tensor_size, PyObject* first,
                                     PyObject* second, int64_t dictionary_size) {
  if (tensor_version == nullptr) return false;
  PyObject* const kind = PyObject_Type(tensor);
  for (int64_t at = sizeof(PyObject*); at < tensor_size; at += sizeof(int64_t)) {
    if (word(tensor, at) == cdata) tensor_at = at;
    if (class_at == 0 && word(tensor, at) == reinterpret_cast<int64_t>(kind)) class_at = at;
  }
  Py_DecRef(kind);
  for (int64_t at = sizeof(PyObject*); at < dictionary_size; at += sizeof(int64_t)) {
    if (word(first, at) == PyDict_Size(first) && word(second, at) == PyDict_Size(second)) length_at = at;
  }
  return class_at > 0 && tensor_at > 0 && length_at > 0;
}

// The two functions, by their number.
FUSED_CNN_EXPORT PyObject* fused_cnn_python_function(int32_t which) {
  return PyCFunction_NewEx(&functions[which], nullptr, nullptr);
}
