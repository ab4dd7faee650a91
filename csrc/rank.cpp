#include "rank.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

#include "isa.h"
#include "parallel.h"
#include "vectors.h"

namespace engine {
namespace {

using Index = std::int64_t;

// Starting a thread costs about as much as ranking this many distances.
constexpr Index kEntriesPerBlock = 1 << 16;

// So many hits have their places counted one by one; with more, every image looks up which hits it stands before.
constexpr Index kFewHits = 64;

// The images of every identity.
class Identities {
 public:
  Identities(const Index* ids, Index count) : ids_(ids), order_(count), numbers_(count) {
    std::iota(order_.begin(), order_.end(), Index(0));
    std::stable_sort(order_.begin(), order_.end(), [ids](Index i, Index j) { return ids[i] < ids[j]; });
    for (Index i = 1; i < count; ++i) {
      numbers_[order_[i]] = numbers_[order_[i - 1]] + (ids[order_[i]] != ids[order_[i - 1]]);
    }
  }

  // Images of `id`, ascending, into `images`.
  void find(Index id, std::vector<Index>& images) const {
    const auto below = [this](Index image, Index value) { return ids_[image] < value; };
    auto image = std::lower_bound(order_.begin(), order_.end(), id, below);
    images.clear();
    for (; image != order_.end() && ids_[*image] == id; ++image) images.push_back(*image);
  }

  // Identities numbered from 0, by image.
  const std::vector<Index>& numbers() const { return numbers_; }

 private:
  const Index* ids_;
  std::vector<Index> order_, numbers_;
};

// How many of `count` distances are smaller than `limit`, or as large where kOrEqual.
template <typename Real, int kBytes, bool kOrEqual>
ENGINE_INLINE Index count_with(const Real* distance, Index count, Real limit) {
  using Vector = typename VectorOf<Real, kBytes>::Type;
  constexpr int kLanes = VectorOf<Real, kBytes>::kLanes;
  auto counts = Vector{} < Vector{};  // integers as wide as Real; a true comparison is -1
  Index i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Vector distances = load<Vector>(distance + i);
    counts += kOrEqual ? distances <= limit : distances < limit;
  }
  Index total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total -= counts[lane];
  for (; i < count; ++i) total += kOrEqual ? distance[i] <= limit : distance[i] < limit;
  return total;
}

// How many images stand before `image`: nearer ones, and of those as near the ones of a lower index.
template <typename Real, int kBytes>
ENGINE_INLINE Index count_before_with(const Real* distance, Index count, Index image) {
  const Real limit = distance[image];
  return count_with<Real, kBytes, true>(distance, image, limit) +
         count_with<Real, kBytes, false>(distance + image, count - image, limit);
}

template <typename Real>
Index count_before_portable(const Real* distance, Index count, Index image) {
  return count_before_with<Real, 16>(distance, count, image);
}

#ifdef ENGINE_X86
template <typename Real>
ENGINE_AVX2 Index count_before_avx2(const Real* distance, Index count, Index image) {
  return count_before_with<Real, 32>(distance, count, image);
}

template <typename Real>
ENGINE_AVX512 Index count_before_avx512(const Real* distance, Index count, Index image) {
  return count_before_with<Real, 64>(distance, count, image);
}
#endif

template <typename Real>
using CountBefore = Index (*)(const Real*, Index, Index);

template <typename Real>
CountBefore<Real> pick_count_before() {
#ifdef ENGINE_X86
  if (isa() == Isa::avx512) return count_before_avx512<Real>;
  if (isa() == Isa::avx2) return count_before_avx2<Real>;
#endif
  return count_before_portable<Real>;
}

// Ranks the gallery for one query after the other. Images that a query does not see have the distance NaN, which no
// comparison counts.
template <typename Real>
class Ranker {
 public:
  Ranker(const Identities& identities, Index count, CountBefore<Real> count_before)
      : identities_(identities), count_(count), count_before_(count_before), distance_(count), seen_(count, -1) {}

  void start(const Real* distance, Index id) {
    const auto known = [](Real value) { return value == value ? value : std::numeric_limits<Real>::infinity(); };
    std::transform(distance, distance + count_, distance_.begin(), known);
    identities_.find(id, hits_);
  }

  // Takes those of `images` that meet `condition` out of sight.
  template <typename Condition>
  void hide(const std::vector<Index>& images, const Condition& condition) {
    for (const Index image : images) {
      if (condition(image)) distance_[image] = std::numeric_limits<Real>::quiet_NaN();
    }
    const auto hidden = [this](Index image) { return distance_[image] != distance_[image]; };
    hits_.erase(std::remove_if(hits_.begin(), hits_.end(), hidden), hits_.end());
  }

  const std::vector<Index>& hits() const { return hits_; }

  // Places of the hits, from 1, ascending.
  const std::vector<Index>& find_places() {
    places_.clear();
    const Index hit_count = static_cast<Index>(hits_.size());
    if (hit_count <= kFewHits) {
      for (const Index hit : hits_) places_.push_back(1 + count_before_(distance_.data(), count_, hit));
      std::sort(places_.begin(), places_.end());
      return places_;
    }
    const auto nearer = [this](Index i, Index j) { return stands_before(i, j); };
    std::sort(hits_.begin(), hits_.end(), nearer);
    places_.assign(hit_count, 0);
    for (Index image = 0; image < count_; ++image) {
      const Index hit = std::lower_bound(hits_.begin(), hits_.end(), image, nearer) - hits_.begin();
      if (distance_[image] == distance_[image] && hit < hit_count) ++places_[hit];  // it or one farther comes first
    }
    std::partial_sum(places_.begin(), places_.end(), places_.begin());
    return places_;
  }

  // Identities of which an image stands before the first hit. `query` is another one at every call.
  Index count_identities_before(Index query) {
    const auto nearer = [this](Index i, Index j) { return stands_before(i, j); };
    const Index first = *std::min_element(hits_.begin(), hits_.end(), nearer);
    Index identity_count = 0;
    for (Index image = 0; image < count_; ++image) {
      if (!stands_before(image, first)) continue;
      Index& last_query = seen_[identities_.numbers()[image]];
      identity_count += last_query != query;
      last_query = query;
    }
    return identity_count;
  }

 private:
  bool stands_before(Index image, Index other) const {
    return distance_[image] < distance_[other] || (distance_[image] == distance_[other] && image < other);
  }

  const Identities& identities_;
  Index count_;
  CountBefore<Real> count_before_;
  std::vector<Real> distance_;
  std::vector<Index> seen_;  // the last query that counted an identity
  std::vector<Index> hits_, places_;
};

// Precision averaged over the hits, added in ranked order.
double average_precision(const std::vector<Index>& places) {
  double sum = 0;
  for (std::size_t i = 0; i < places.size(); ++i) sum += double(i + 1) / double(places[i]);
  return sum / double(places.size());
}

std::vector<Index> images_of_camera(const Index* cams, Index count, Index camera) {
  std::vector<Index> images;
  for (Index image = 0; image < count; ++image) {
    if (cams[image] == camera) images.push_back(image);
  }
  return images;
}

}  // namespace

template <typename Real>
void rank(const Real* distance, const Index* query_ids, const Index* gallery_ids, const Index* query_cams,
          const Index* gallery_cams, Index queries, Index gallery, Protocol protocol, Index* before, double* precision,
          double* penalty, int threads) {
  const Identities identities(gallery_ids, gallery);
  const CountBefore<Real> count_before = pick_count_before<Real>();
  std::vector<Index> same_place;  // as camera 3
  if (protocol == Protocol::sysu) same_place = images_of_camera(gallery_cams, gallery, 2);

  const auto body = [&](Index begin, Index end) {
    Ranker<Real> ranker(identities, gallery, count_before);
    for (Index query = begin; query < end; ++query) {
      ranker.start(distance + query * gallery, query_ids[query]);
      const bool own = protocol == Protocol::llcm;
      const auto hidden = [&](Index image) { return hides(protocol, query_cams[query], gallery_cams, image, own); };
      if (protocol != Protocol::plain) ranker.hide(own ? ranker.hits() : same_place, hidden);
      before[query] = -1;
      if (ranker.hits().empty()) continue;
      const std::vector<Index>& places = ranker.find_places();
      before[query] = protocol == Protocol::plain ? places.front() - 1 : ranker.count_identities_before(query);
      precision[query] = average_precision(places);
      penalty[query] = double(places.size()) / double(places.back());
    }
  };
  parallel_for(queries, 1 + kEntriesPerBlock / std::max<Index>(gallery, 1), threads, body);
}

template void rank(const float*, const Index*, const Index*, const Index*, const Index*, Index, Index, Protocol, Index*,
                   double*, double*, int);
template void rank(const double*, const Index*, const Index*, const Index*, const Index*, Index, Index, Protocol,
                   Index*, double*, double*, int);

}  // namespace engine
