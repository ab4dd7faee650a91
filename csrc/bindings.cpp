// engine._C: raw addresses and sizes in, nothing out. All checks are made in Python, by engine/ops.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "isa.h"
#include "memory_update_.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

template <typename Real>
void memory_update_(Address bank, Address features, Address labels, Address momentum, std::int64_t bank_rows,
                    std::int64_t batch, std::int64_t width, bool normalize, int threads) {
  engine::memory_update(reinterpret_cast<Real*>(bank), reinterpret_cast<const Real*>(features),
                        reinterpret_cast<const std::int64_t*>(labels), reinterpret_cast<const Real*>(momentum),
                        bank_rows, batch, width, normalize, threads);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "C++ back ends of engine.ops";
  const py::call_guard<py::gil_scoped_release> release;
  module.def("isa", [] { return engine::name(engine::isa()); });
  module.def("memory_update_float32", &memory_update_<float>, release);
  module.def("memory_update_float64", &memory_update_<double>, release);
}
