// engine._C: raw addresses and sizes in; results go where addresses say. All checks are made in Python, by engine/ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "cmfp.h"
#include "cuda_driver.h"
#include "dbscan.h"
#include "isa.h"
#include "jaccard.h"
#include "knn_intersection.h"
#include "memory_update_.h"
#include "neighbor_contrast.h"
#include "propagate.h"
#include "rank.h"
#include "rows.h"
#include "segment_mean.h"
#include "set_intersection.h"
#include "set_union.h"
#include "sinkhorn.h"
#include "soft_contrast.h"
#include "sources.h"
#include "topk.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

template <typename Real>
engine::StoredRows<Real> rows(Address data, int storage, std::int64_t width) {
  return {reinterpret_cast<const void*>(data), static_cast<engine::Storage>(storage), width};
}

template <typename Real>
void cmfp(Address vis, int vis_storage, Address ir, int ir_storage, std::int64_t vis_count, std::int64_t ir_count,
          std::int64_t vis_first, std::int64_t new_vis_count, std::int64_t ir_first, std::int64_t new_ir_count,
          std::int64_t width, std::int64_t k, bool normalize, Address new_vis, Address new_ir, int threads) {
  engine::cmfp(rows<Real>(vis, vis_storage, width), rows<Real>(ir, ir_storage, width), vis_count, ir_count,
               {vis_first, new_vis_count}, {ir_first, new_ir_count}, k, normalize, reinterpret_cast<Real*>(new_vis),
               reinterpret_cast<Real*>(new_ir), threads);
}

// Packs Python numbers as a kernel's arguments: int as int64 or an address, float as float, bool as bool.
void cuda_launch(int device, Address kernel, const std::array<unsigned, 3>& grid, const std::array<unsigned, 3>& block,
                 unsigned shared_bytes, Address stream, bool cooperative, const py::sequence& arguments) {
  std::vector<std::uint64_t> values(arguments.size());
  std::vector<void*> addresses(arguments.size());
  for (std::size_t place = 0; place < values.size(); ++place) {
    const py::object argument = arguments[place];
    addresses[place] = &values[place];
    if (PyBool_Check(argument.ptr())) {
      const bool value = argument.cast<bool>();
      std::memcpy(addresses[place], &value, sizeof(value));
    } else if (PyFloat_Check(argument.ptr())) {
      const float value = argument.cast<float>();
      std::memcpy(addresses[place], &value, sizeof(value));
    } else {
      const std::int64_t value = argument.cast<std::int64_t>();
      std::memcpy(addresses[place], &value, sizeof(value));
    }
  }
  const engine::cuda::Shape shape{{grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, shared_bytes};
  const py::gil_scoped_release release;
  engine::cuda::launch(device, kernel, shape, stream, cooperative, addresses.data());
}

template <typename Real>
void dbscan(Address starts, Address columns, Address values, Address labels, std::int64_t count, double eps,
            std::int64_t min_samples, int threads) {
  engine::dbscan(reinterpret_cast<const std::int64_t*>(starts), reinterpret_cast<const std::int64_t*>(columns),
                 reinterpret_cast<const Real*>(values), reinterpret_cast<std::int64_t*>(labels), count, eps,
                 min_samples, threads);
}

// A class, as only the result tells how much room it needs.
template <typename Real>
void bind_jaccard(py::module_& module, const char* name) {
  using Jaccard = engine::Jaccard<Real>;
  const py::call_guard<py::gil_scoped_release> release;
  py::class_<Jaccard>(module, name)
      .def(py::init([](Address features, Address neighbors, std::int64_t count, std::int64_t width, std::int64_t k1,
                       std::int64_t half, std::int64_t k2, int threads) {
             return Jaccard(reinterpret_cast<const Real*>(features), reinterpret_cast<const std::int64_t*>(neighbors),
                            count, width, k1, half, k2, threads);
           }),
           release)
      .def("entry_count", &Jaccard::entry_count)
      .def(
          "write",
          [](const Jaccard& distances, Address starts, Address columns, Address values, int threads) {
            distances.write(reinterpret_cast<std::int64_t*>(starts), reinterpret_cast<std::int64_t*>(columns),
                            reinterpret_cast<Real*>(values), threads);
          },
          release);
}

void knn_intersection(Address neighbors, std::int64_t views, std::int64_t rows, std::int64_t k, Address common,
                      int threads) {
  engine::knn_intersection(reinterpret_cast<const std::int64_t*>(neighbors), views, rows, k,
                           reinterpret_cast<std::int64_t*>(common), threads);
}

template <typename Real>
void memory_update_(Address bank, Address features, Address labels, Address momentum, double shared_momentum,
                    std::int64_t bank_rows, std::int64_t batch, std::int64_t width, bool normalize, int threads) {
  engine::memory_update(reinterpret_cast<Real*>(bank), reinterpret_cast<const Real*>(features),
                        reinterpret_cast<const std::int64_t*>(labels), reinterpret_cast<const Real*>(momentum),
                        shared_momentum, bank_rows, batch, width, normalize, threads);
}

template <typename Real>
void neighbor_contrast(Address features, Address bank, int bank_storage, Address positives, std::int64_t batch,
                       std::int64_t bank_count, std::int64_t set_size, std::int64_t width, double temperature,
                       Address losses, Address gradients, int threads) {
  engine::neighbor_contrast(reinterpret_cast<const Real*>(features), rows<Real>(bank, bank_storage, width),
                            reinterpret_cast<const std::int64_t*>(positives), batch, bank_count, set_size, temperature,
                            reinterpret_cast<Real*>(losses), reinterpret_cast<Real*>(gradients), threads);
}

template <typename Real>
void propagate(Address starts, Address columns, Address values, std::int64_t row_count, std::int64_t column_count,
               Address features, int features_storage, std::int64_t width, Address target, int threads) {
  const engine::Graph<Real> graph{reinterpret_cast<const std::int64_t*>(starts),
                                  reinterpret_cast<const std::int64_t*>(columns), reinterpret_cast<const Real*>(values),
                                  row_count, column_count};
  engine::propagate(graph, rows<Real>(features, features_storage, width), reinterpret_cast<Real*>(target), threads);
}

template <typename Real>
void rank(Address distance, Address query_ids, Address gallery_ids, Address query_cams, Address gallery_cams,
          std::int64_t queries, std::int64_t gallery, int protocol, Address before, Address precision, Address penalty,
          int threads) {
  engine::rank(reinterpret_cast<const Real*>(distance), reinterpret_cast<const std::int64_t*>(query_ids),
               reinterpret_cast<const std::int64_t*>(gallery_ids), reinterpret_cast<const std::int64_t*>(query_cams),
               reinterpret_cast<const std::int64_t*>(gallery_cams), queries, gallery,
               static_cast<engine::Protocol>(protocol), reinterpret_cast<std::int64_t*>(before),
               reinterpret_cast<double*>(precision), reinterpret_cast<double*>(penalty), threads);
}

template <typename Real>
void segment_mean(Address features, int storage, Address labels, std::int64_t row_count, std::int64_t width,
                  std::int64_t segments, Address means) {
  engine::segment_mean(rows<Real>(features, storage, width), reinterpret_cast<const std::int64_t*>(labels), row_count,
                       segments, reinterpret_cast<Real*>(means));
}

void set_intersection(Address a, Address b, std::int64_t rows, std::int64_t a_width, std::int64_t b_width,
                      Address common, int threads) {
  engine::set_intersection(reinterpret_cast<const std::int64_t*>(a), reinterpret_cast<const std::int64_t*>(b), rows,
                           a_width, b_width, reinterpret_cast<std::int64_t*>(common), threads);
}

void set_union(Address a, Address b, std::int64_t rows, std::int64_t a_width, std::int64_t b_width, Address joined,
               int threads) {
  engine::set_union(reinterpret_cast<const std::int64_t*>(a), reinterpret_cast<const std::int64_t*>(b), rows, a_width,
                    b_width, reinterpret_cast<std::int64_t*>(joined), threads);
}

template <typename Real>
void sinkhorn(Address cost, Address log_a, Address log_b, std::int64_t problems, std::int64_t rows,
              std::int64_t columns, double reg, double relax, std::int64_t max_iter, double tol, Address log_u,
              Address log_v, Address iterations, Address error, int threads) {
  engine::sinkhorn(reinterpret_cast<const Real*>(cost), reinterpret_cast<const Real*>(log_a),
                   reinterpret_cast<const Real*>(log_b), problems, rows, columns, {reg, relax, max_iter, tol},
                   reinterpret_cast<Real*>(log_u), reinterpret_cast<Real*>(log_v),
                   reinterpret_cast<std::int64_t*>(iterations), reinterpret_cast<Real*>(error), threads);
}

template <typename Real>
void soft_contrast(Address features, Address bank, int bank_storage, Address weights, int weights_storage,
                   std::int64_t batch, std::int64_t bank_count, std::int64_t width, double temperature, Address losses,
                   Address gradients, int threads) {
  engine::soft_contrast(reinterpret_cast<const Real*>(features), rows<Real>(bank, bank_storage, width),
                        rows<Real>(weights, weights_storage, 1), batch, bank_count, temperature,
                        reinterpret_cast<Real*>(losses), reinterpret_cast<Real*>(gradients), threads);
}

template <typename Real>
void topk(Address queries, int queries_storage, Address bank, int bank_storage, std::int64_t query_count,
          std::int64_t bank_count, std::int64_t width, std::int64_t k, bool exclude_self, Address values,
          Address indices, int threads) {
  engine::topk(rows<Real>(queries, queries_storage, width), rows<Real>(bank, bank_storage, width), query_count,
               bank_count, k, exclude_self, reinterpret_cast<Real*>(values), reinterpret_cast<std::int64_t*>(indices),
               threads);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "C++ back ends of engine.ops";
  const py::call_guard<py::gil_scoped_release> release;
  module.def("cmfp_float32", &cmfp<float>, release);
  module.def("cmfp_float64", &cmfp<double>, release);
  py::register_exception<engine::cuda::Error>(module, "CudaError", PyExc_RuntimeError);
  module.def("cuda_find_kernel", &engine::cuda::find_kernel, release);
  module.def("cuda_launch", &cuda_launch);
  module.def(
      "cuda_load_module",
      [](int device, const std::string& image) { return engine::cuda::load_module(device, image.c_str()); }, release);
  module.def("dbscan_float32", &dbscan<float>, release);
  module.def("dbscan_float64", &dbscan<double>, release);
  module.def("isa", [] { return engine::name(engine::isa()); });
  bind_jaccard<float>(module, "jaccard_float32");
  bind_jaccard<double>(module, "jaccard_float64");
  module.def("knn_intersection", &knn_intersection, release);
  module.def("memory_update_float32", &memory_update_<float>, release);
  module.def("memory_update_float64", &memory_update_<double>, release);
  module.def("neighbor_contrast_float32", &neighbor_contrast<float>, release);
  module.def("neighbor_contrast_float64", &neighbor_contrast<double>, release);
  module.def("propagate_float32", &propagate<float>, release);
  module.def("propagate_float64", &propagate<double>, release);
  module.def("rank_float32", &rank<float>, release);
  module.def("rank_float64", &rank<double>, release);
  module.def("segment_mean_float32", &segment_mean<float>, release);
  module.def("segment_mean_float64", &segment_mean<double>, release);
  module.def("set_intersection", &set_intersection, release);
  module.def("set_union", &set_union, release);
  module.def("sinkhorn_float32", &sinkhorn<float>, release);
  module.def("sinkhorn_float64", &sinkhorn<double>, release);
  module.def("soft_contrast_float32", &soft_contrast<float>, release);
  module.def("soft_contrast_float64", &soft_contrast<double>, release);
  module.def("sources", &engine::sources);
  module.def("topk_float32", &topk<float>, release);
  module.def("topk_float64", &topk<double>, release);
}
