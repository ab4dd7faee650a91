#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace engine {
namespace {

Isa widest() {
#ifdef ENGINE_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512) return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::portable;
}

}  // namespace

Isa isa() {
  const Isa available = widest();
  const char* forced = std::getenv("ENGINE_ISA");
  if (forced == nullptr || *forced == '\0') return available;
  for (const Isa isa : {Isa::portable, Isa::avx2, Isa::avx512}) {
    if (std::string(forced) == name(isa) && isa <= available) return isa;
  }
  throw std::invalid_argument(
      std::string("ENGINE_ISA must be portable, avx2 or avx512, and this processor runs up to ") + name(available) +
      "; got " + forced);
}

const char* name(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "portable";
  }
}

}  // namespace engine
