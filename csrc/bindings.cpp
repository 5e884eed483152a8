// SPDX-License-Identifier: Apache-2.0
// fastreid_u._C: the only file that knows Python. Pointers come in as integers and are trusted; checks of shape, dtype
// and device are the caller's (fastreid_u/ops/). The GIL is released while the work runs, except
// where a launcher calls Python back.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
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

std::unique_ptr<fu::Core> on_launcher(py::object launcher) {
  return fu::on_launcher(std::make_unique<PythonLauncher>(std::move(launcher)));
}

#ifdef FASTREID_U_WITH_CUDA
std::unique_ptr<fu::Core> on_cuda(int device, uintptr_t stream) { return fu::on_cuda(device, pointer<void>(stream)); }
#endif

// The functions of the core that `make` gives from Python's last arguments, named `...names`, as check_graph_<where>,
// dbscan_<where> and pseudo_labels_<where>. `Guard` holds while they run.
template <class Guard, class... Given, class... Names>
void bind_core(py::module_& m, const std::string& where, std::unique_ptr<fu::Core> (*make)(Given...), Names... names) {
  m.def(
      ("check_graph_" + where).c_str(),
      [make](const fu::Graph& graph, uintptr_t scratch, Given... given) {
        return make(std::move(given)...)->check_graph(graph, pointer<int64_t>(scratch));
      },
      Guard(), py::arg("graph"), py::arg("scratch"), names...);
  m.def(
      ("dbscan_" + where).c_str(),
      [make](const fu::Graph& graph, const std::vector<double>& eps, int64_t min_samples, uintptr_t labels,
             uintptr_t core, uintptr_t scratch, Given... given) {
        make(std::move(given)...)
            ->dbscan(graph, eps.data(), static_cast<int64_t>(eps.size()), min_samples, pointer<int64_t>(labels),
                     pointer<uint8_t>(core), pointer<int64_t>(scratch));
      },
      Guard(), py::arg("graph"), py::arg("eps"), py::arg("min_samples"), py::arg("labels"), py::arg("core"),
      py::arg("scratch"), names...);
  m.def(
      ("pseudo_labels_" + where).c_str(),
      [make](const fu::Encoding& encoding, const std::vector<int64_t>& need, int64_t min_samples, uintptr_t labels,
             uintptr_t scratch, Given... given) {
        make(std::move(given)...)
            ->pseudo_labels(encoding, need.data(), static_cast<int64_t>(need.size()), min_samples,
                            pointer<int64_t>(labels), pointer<int64_t>(scratch));
      },
      Guard(), py::arg("encoding"), py::arg("need"), py::arg("min_samples"), py::arg("labels"), py::arg("scratch"),
      names...);
}

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

  m.def("dbscan_scratch_words", &fu::dbscan_scratch_words, py::arg("n"));
  m.def("pseudo_labels_scratch_words", &fu::pseudo_labels_scratch_words, py::arg("n"), py::arg("nnz"),
        py::arg("min_samples"));

  using release = py::call_guard<py::gil_scoped_release>;
  using keep = py::call_guard<>;
  bind_core<release>(m, "cpu", &fu::on_threads, py::arg("threads"));
  bind_core<keep>(m, "launched", &on_launcher, py::arg("launcher"));
#ifdef FASTREID_U_WITH_CUDA
  bind_core<release>(m, "cuda", &on_cuda, py::arg("device"), py::arg("stream"));
#endif
}
