// Retrieval scores on the GPU, a block per query. Semantics: engine/ops/rank.py.
//
// As on the CPU only the hits are put in order, the gallery is not: each image looks up which hit it stands before, the
// counts give the hits' places, and marks the identities that come before the first. One reading of the distances does
// it where a query has up to kBlockThreads images of its identity and the gallery up to kMarks images; beyond that, one
// for each so many.
#include "block.h"
#include "rank.h"
#include "storage.h"

namespace {

using engine::kBlockThreads;
using engine::Protocol;
using Index = std::int64_t;
using Count = std::uint32_t;  // of images, of which there are less than 2^31

// What an image stands by, the lower the nearer: its distance in the upper half, below it the image.
using Key = unsigned long long;

constexpr Key kUnseen = ~0ull;
constexpr int kBlocks = 6;  // of a multiprocessor, at least: enough to hide waiting, and registers to spare
constexpr int kBits = 32;   // of a word of marks
constexpr int kWords = 8;   // of marks, for each thread
constexpr Count kMarks = kBits * kWords * kBlockThreads;

// The gallery as a query sees it.
template <typename Stored>
struct View {
  const Stored* distance;
  const Count* identities;
  Count own;
  Protocol protocol;
  Index camera;
  const Index* gallery_cams;

  __device__ bool is_own(Count image) const { return identities[image] == own; }

  __device__ Key key(Count image) const {
    if (engine::hides(protocol, camera, gallery_cams, image, is_own(image))) return kUnseen;
    return static_cast<Key>(engine::ascending_bits(static_cast<float>(distance[image]))) << 32 | image;
  }
};

// How many of `count` ascending keys are lower.
__device__ Count count_lower(const Key* keys, Count count, Key key) {
  Count begin = 0, end = count;
  while (begin < end) {
    const Count middle = (begin + end) / 2;
    if (keys[middle] < key) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

// `images` [image_count] are those of the query's identity. Writes precision and penalty, 0 for a query without a hit,
// and counts any other one in found[what stands before its first hit, at most max_rank].
template <typename Stored>
__device__ void rank(const View<Stored>& view, Count gallery, const Index* images, Count image_count, Index max_rank,
                     Key* found, double* precision, double* penalty) {
  __shared__ Key listed[kBlockThreads], hits[kBlockThreads], nearest;
  __shared__ Count image_counts[kBlockThreads], hit_counts[kBlockThreads];
  __shared__ unsigned marks[kWords * kBlockThreads];
  __shared__ Count last_place;
  const Count thread = threadIdx.x;
  const bool by_identity = view.protocol != Protocol::plain;
  if (thread == 0) {
    nearest = kUnseen;
    last_place = 0;
  }
  __syncthreads();
  for (Count i = thread; i < image_count; i += kBlockThreads)
    atomicMin(&nearest, view.key(static_cast<Count>(images[i])));
  __syncthreads();
  const Key first_hit = nearest;
  if (first_hit == kUnseen) {
    if (thread == 0) *precision = *penalty = 0;
    return;
  }

  Count hit_count = 0, before = 0;
  double precisions = 0;
  Count first_image = 0, first_mark = 0;
  while (first_image < image_count || (by_identity && first_mark < gallery)) {
    const Count place_of_own = first_image + thread;
    const Key own = place_of_own < image_count ? view.key(static_cast<Count>(images[place_of_own])) : kUnseen;
    listed[thread] = own;
    image_counts[thread] = hit_counts[thread] = 0;
    for (Count word = thread; word < kWords * kBlockThreads; word += kBlockThreads) marks[word] = 0;
    const Count size = __syncthreads_count(own != kUnseen);
    if (own != kUnseen) {
      const Count left = image_count - first_image, length = left < kBlockThreads ? left : kBlockThreads;
      Count lower = 0;
      for (Count other = 0; other < length; ++other) lower += listed[other] < own;
      hits[lower] = own;
    }
    __syncthreads();

    for (Count image = thread; image < gallery; image += kBlockThreads) {
      const Key key = view.key(image);
      if (by_identity && key < first_hit) {
        const Count mark = view.identities[image] - first_mark;  // a huge one for those before
        if (mark < kMarks) atomicOr(marks + mark / kBits, 1u << mark % kBits);
      }
      const Count hit = count_lower(hits, size, key);
      if (hit == size) continue;
      atomicAdd(image_counts + hit, 1);  // it or one farther comes first
      if (view.is_own(image)) atomicAdd(hit_counts + hit, 1);
    }
    __syncthreads();

    if (thread < size) {
      Count place = 0, hit_place = 0;  // from 1, among images and among hits
      for (Count hit = 0; hit <= thread; ++hit) {
        place += image_counts[hit];
        hit_place += hit_counts[hit];
      }
      precisions += static_cast<double>(hit_place) / static_cast<double>(place);
      if (!by_identity && hits[thread] == first_hit) before = place - 1;
      if (thread == size - 1 && place > last_place) last_place = place;
    }
    if (by_identity) {
      for (Count word = thread; word < kWords * kBlockThreads; word += kBlockThreads) before += __popc(marks[word]);
    }
    hit_count += size;
    first_image += kBlockThreads;
    first_mark += kMarks;
    __syncthreads();  // before the next reading overwrites the counts
  }
  before = engine::block_sum(before);
  precisions = engine::block_sum(precisions);
  if (thread > 0) return;
  *precision = precisions / static_cast<double>(hit_count);
  *penalty = static_cast<double>(hit_count) / static_cast<double>(last_place);
  atomicAdd(found + (before < max_rank ? before : max_rank), 1ull);
}

}  // namespace

// rank_<type>_kernel: distance [queries, gallery]; identities [gallery], equal for equal ids; order [gallery] has the
// images of query i's identity, of which the number is begins[i], from begins[i] to ends[i]; the cameras may be null
// for `plain`. found [max_rank + 1] grows by the queries that have so many images, or identities unless `plain`, before
// their first hit, the last by those that have more; scores [2, queries] are average precisions and inverse negative
// penalties.
#define ENGINE_RANK(name, Stored)                                                                                      \
  extern "C" __global__ void __launch_bounds__(kBlockThreads, kBlocks)                                                 \
      rank_##name##_kernel(const Stored* distance, const Index* order, const Count* begins, const Count* ends,         \
                           const Count* identities, const Index* query_cams, const Index* gallery_cams, Index gallery, \
                           Index protocol, Index max_rank, Key* found, double* scores) {                               \
    const Index query = blockIdx.x, queries = gridDim.x;                                                               \
    const View<Stored> view{                                                                                           \
        distance + query * gallery,         identities,  begins[query], static_cast<Protocol>(protocol),               \
        query_cams ? query_cams[query] : 0, gallery_cams};                                                             \
    rank(view, static_cast<Count>(gallery), order + begins[query], ends[query] - begins[query], max_rank, found,       \
         scores + query, scores + queries + query);                                                                    \
  }
ENGINE_EVERY_STORAGE(ENGINE_RANK)
