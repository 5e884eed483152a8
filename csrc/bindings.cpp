// SPDX-License-Identifier: Apache-2.0
// fastreid_u._C: the only file that knows Python. Pointers come in as integers and are trusted; checks of shape, dtype
// and device are the caller's (fastreid_u/ops/). The GIL is released while the work runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "api.h"

namespace py = pybind11;
namespace fu = fastreid_u;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

fu::Graph make_graph(uintptr_t indptr, uintptr_t indices, uintptr_t data, int64_t n, int64_t nnz, int index_bytes,
                     int value_bytes) {
  if ((index_bytes != 4 && index_bytes != 8) || (value_bytes != 4 && value_bytes != 8)) {
    throw py::value_error("Graph: index_bytes and value_bytes must be 4 or 8");
  }
  return {pointer<const int64_t>(indptr), pointer<const void>(indices), pointer<const void>(data), n, nnz,
          index_bytes, value_bytes};
}

fu::Encoding make_encoding(uintptr_t indptr, uintptr_t column, uintptr_t mass, uintptr_t neighbours, int64_t n,
                           int64_t nnz, int64_t k, int64_t weight) {
  return {pointer<const int64_t>(indptr),     pointer<const int32_t>(column), pointer<const int32_t>(mass),
          pointer<const int32_t>(neighbours), n, nnz, k, weight};
}

// A Python object with `launch(kernel, blocks, threads, n, functor: bytes)`, `read(address)` and `write(address, value)`.
class PythonLauncher : public fu::Launcher {
 public:
  explicit PythonLauncher(py::object object) : object_(std::move(object)) {}
  void launch(const std::string& kernel, unsigned blocks, unsigned threads, int64_t n, const void* functor,
              int64_t bytes) override {
    const py::bytes packed(static_cast<const char*>(functor), static_cast<size_t>(bytes));
    object_.attr("launch")(kernel, blocks, threads, n, packed);
  }
  int64_t read(const int64_t* p) override {
    return object_.attr("read")(reinterpret_cast<uintptr_t>(p)).cast<int64_t>();
  }
  void write(int64_t* p, int64_t value) override { object_.attr("write")(reinterpret_cast<uintptr_t>(p), value); }

 private:
  py::object object_;
};

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled core of fastreid_u: exact DBSCAN, on a graph of distances and on an encoding.";
#ifdef FASTREID_U_WITH_CUDA
  m.attr("built_with_cuda") = true;
#else
  m.attr("built_with_cuda") = false;
#endif
  // In the order of fu::Fault: a check returns row * len(faults) + position, or -1.
  m.attr("faults") = py::make_tuple("indptr", "column", "order", "nan", "negative");

  py::class_<fu::Graph>(m, "Graph")
      .def(py::init(&make_graph), py::kw_only(), py::arg("indptr"), py::arg("indices"), py::arg("data"), py::arg("n"),
           py::arg("nnz"), py::arg("index_bytes"), py::arg("value_bytes"));

  py::class_<fu::Encoding>(m, "Encoding")
      .def(py::init(&make_encoding), py::kw_only(), py::arg("indptr"), py::arg("column"), py::arg("mass"),
           py::arg("neighbours"), py::arg("n"), py::arg("nnz"), py::arg("k"), py::arg("weight"));

  using release = py::call_guard<py::gil_scoped_release>;
  m.def("dbscan_scratch_words", &fu::dbscan_scratch_words, py::arg("n"));
  m.def(
      "check_graph_cpu",
      [](const fu::Graph& graph, uintptr_t scratch, int threads) {
        return fu::check_graph_cpu(graph, pointer<int64_t>(scratch), threads);
      },
      release(), py::arg("graph"), py::arg("scratch"), py::arg("threads"));
  m.def(
      "dbscan_cpu",
      [](const fu::Graph& graph, const std::vector<double>& eps, int64_t min_samples, uintptr_t labels, uintptr_t core,
         uintptr_t scratch, int threads) {
        fu::dbscan_cpu(graph, eps.data(), static_cast<int64_t>(eps.size()), min_samples, pointer<int64_t>(labels),
                       pointer<uint8_t>(core), pointer<int64_t>(scratch), threads);
      },
      release(), py::arg("graph"), py::arg("eps"), py::arg("min_samples"), py::arg("labels"), py::arg("core"),
      py::arg("scratch"), py::arg("threads"));
  m.def("pseudo_labels_scratch_words", &fu::pseudo_labels_scratch_words, py::arg("n"), py::arg("nnz"),
        py::arg("min_samples"));
  m.def(
      "pseudo_labels_cpu",
      [](const fu::Encoding& encoding, const std::vector<int64_t>& need, int64_t min_samples, uintptr_t labels,
         uintptr_t scratch, int threads) {
        fu::pseudo_labels_cpu(encoding, need.data(), static_cast<int64_t>(need.size()), min_samples,
                              pointer<int64_t>(labels), pointer<int64_t>(scratch), threads);
      },
      release(), py::arg("encoding"), py::arg("need"), py::arg("min_samples"), py::arg("labels"), py::arg("scratch"),
      py::arg("threads"));
  // These call Python back, so they keep the GIL.
  m.def(
      "check_graph_by",
      [](const fu::Graph& graph, uintptr_t scratch, py::object launcher) {
        PythonLauncher by(std::move(launcher));
        return fu::check_graph_by(by, graph, pointer<int64_t>(scratch));
      },
      py::arg("graph"), py::arg("scratch"), py::arg("launcher"));
  m.def(
      "dbscan_by",
      [](const fu::Graph& graph, const std::vector<double>& eps, int64_t min_samples, uintptr_t labels, uintptr_t core,
         uintptr_t scratch, py::object launcher) {
        PythonLauncher by(std::move(launcher));
        fu::dbscan_by(by, graph, eps.data(), static_cast<int64_t>(eps.size()), min_samples, pointer<int64_t>(labels),
                      pointer<uint8_t>(core), pointer<int64_t>(scratch));
      },
      py::arg("graph"), py::arg("eps"), py::arg("min_samples"), py::arg("labels"), py::arg("core"), py::arg("scratch"),
      py::arg("launcher"));
  m.def(
      "pseudo_labels_by",
      [](const fu::Encoding& encoding, const std::vector<int64_t>& need, int64_t min_samples, uintptr_t labels,
         uintptr_t scratch, py::object launcher) {
        PythonLauncher by(std::move(launcher));
        fu::pseudo_labels_by(by, encoding, need.data(), static_cast<int64_t>(need.size()), min_samples,
                             pointer<int64_t>(labels), pointer<int64_t>(scratch));
      },
      py::arg("encoding"), py::arg("need"), py::arg("min_samples"), py::arg("labels"), py::arg("scratch"),
      py::arg("launcher"));
#ifdef FASTREID_U_WITH_CUDA
  m.def(
      "check_graph_cuda",
      [](const fu::Graph& graph, uintptr_t scratch, int device, uintptr_t stream) {
        return fu::check_graph_cuda(graph, pointer<int64_t>(scratch), device, pointer<void>(stream));
      },
      release(), py::arg("graph"), py::arg("scratch"), py::arg("device"), py::arg("stream"));
  m.def(
      "dbscan_cuda",
      [](const fu::Graph& graph, const std::vector<double>& eps, int64_t min_samples, uintptr_t labels, uintptr_t core,
         uintptr_t scratch, int device, uintptr_t stream) {
        fu::dbscan_cuda(graph, eps.data(), static_cast<int64_t>(eps.size()), min_samples, pointer<int64_t>(labels),
                        pointer<uint8_t>(core), pointer<int64_t>(scratch), device, pointer<void>(stream));
      },
      release(), py::arg("graph"), py::arg("eps"), py::arg("min_samples"), py::arg("labels"), py::arg("core"),
      py::arg("scratch"), py::arg("device"), py::arg("stream"));
  m.def(
      "pseudo_labels_cuda",
      [](const fu::Encoding& encoding, const std::vector<int64_t>& need, int64_t min_samples, uintptr_t labels,
         uintptr_t scratch, int device, uintptr_t stream) {
        fu::pseudo_labels_cuda(encoding, need.data(), static_cast<int64_t>(need.size()), min_samples,
                               pointer<int64_t>(labels), pointer<int64_t>(scratch), device, pointer<void>(stream));
      },
      release(), py::arg("encoding"), py::arg("need"), py::arg("min_samples"), py::arg("labels"), py::arg("scratch"),
      py::arg("device"), py::arg("stream"));
#endif
}
