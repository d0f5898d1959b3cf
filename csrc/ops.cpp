// Every schema of the extension, and the Python module that loading it needs.
// Only libtorch's stable C interface and Python's limited one are used: one binary serves many versions of both.
#undef Py_LIMITED_API
#define Py_LIMITED_API 0x030A0000  // Python 3.10
#include <Python.h>

#include <torch/csrc/stable/library.h>

// B sequences, T tokens. values float32 [B,T], mask bool [B,T] -> bool [B,T].
STABLE_TORCH_LIBRARY_FRAGMENT(rhythm_kernels, m) {
  m.def("segment_topq(Tensor values, Tensor mask, float q, bool largest) -> Tensor");
  m.def("find_peaks(Tensor values, Tensor mask, float min_quantile) -> Tensor");
}

// Importing the module loads the library, and with it the registrations above. HAS_CUDA: the CUDA kernels are in it.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
#ifdef RHYTHM_KERNELS_WITH_CUDA
  const long has_cuda = 1;
#else
  const long has_cuda = 0;
#endif
  if (module != nullptr && PyModule_AddIntConstant(module, "HAS_CUDA", has_cuda) != 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
