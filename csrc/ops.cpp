// Defines every schema of the extension, and the Python module by which it is loaded.
// Uses only libtorch's stable C interface and Python's limited one, so that one binary serves many versions of both.
#undef Py_LIMITED_API
#define Py_LIMITED_API 0x030A0000  // Python 3.10
#include <Python.h>

#include <torch/csrc/stable/library.h>

// B rows of T tokens; S sequences: the rows, or the parts into which cu_seqlens int32 [S+1] cuts one row. Signals are
// float32 [B,T], response_mask is bool [B,T]. The bits of faults and memberships are those of csrc/rows/credit.h.
STABLE_TORCH_LIBRARY_FRAGMENT(rhythm_kernels, m) {
  // selected bool [B,T], has_nan bool [S]
  m.def(
      "segment_topq(Tensor values, Tensor response_mask, Tensor? cu_seqlens, float top_fraction, bool largest) -> "
      "(Tensor, Tensor)");
  // peaks bool [B,T]
  m.def("find_peaks(Tensor values, Tensor response_mask, Tensor? cu_seqlens, float min_quantile) -> Tensor");
  // gamma float32 [B,T], faults uint8 [S]
  m.def(
      "topq_credit(Tensor values, Tensor response_mask, Tensor? cu_seqlens, bool of_delta, bool drops, "
      "float top_fraction, float amplification, bool largest) -> (Tensor, Tensor)");
  // gamma float32 [B,T], faults uint8 [S]; if with_sets: memberships uint8 [B,T], steps back to the intro int32 [B,T]
  m.def(
      "coupled_credit(Tensor waad, Tensor fai, Tensor response_mask, Tensor? cu_seqlens, float top_fraction, "
      "float preplan_fraction, float amplification, float shared_fraction, int max_lookback, bool largest, bool drops, "
      "float? tau_waad, float? tau_delta, bool with_sets) -> (Tensor, Tensor, Tensor, Tensor)");
}

// Importing the module loads the library, which registers the ops. HAS_CUDA is 1 if it has the CUDA kernels.
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
