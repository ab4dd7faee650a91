// Retrieval scores: the rules on any device, and the function for the CPU. Semantics: engine/ops/rank.py.
#pragma once

#include "host_device.h"

namespace engine {

enum class Protocol { plain, sysu, llcm };

// Whether a query from query_cam must not see an image. The cameras are not read for `plain`.
ENGINE_HOST_DEVICE inline bool hides(Protocol protocol, std::int64_t query_cam, const std::int64_t* gallery_cams,
                                     std::int64_t image, bool same_identity) {
  if (protocol == Protocol::sysu) return query_cam == 3 && gallery_cams[image] == 2;  // the same place
  return protocol == Protocol::llcm && same_identity && gallery_cams[image] == query_cam;
}

// distance [queries, gallery], ids and cameras by query and by gallery image; the cameras may be null for `plain`. Out,
// per query: what stands before its first hit (images, or identities unless `plain`), -1 when it has none; its average
// precision and inverse negative penalty. The result does not depend on `threads`.
template <typename Real>
void rank(const Real* distance, const std::int64_t* query_ids, const std::int64_t* gallery_ids,
          const std::int64_t* query_cams, const std::int64_t* gallery_cams, std::int64_t queries, std::int64_t gallery,
          Protocol protocol, std::int64_t* before, double* precision, double* penalty, int threads);

}  // namespace engine
