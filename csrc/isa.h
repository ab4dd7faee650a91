// Which vector instructions the kernels use.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#define ENGINE_X86 1
// Before a function that is compiled for these instructions whatever the rest of the file is compiled for.
#define ENGINE_AVX2 __attribute__((target("avx2,fma")))
#define ENGINE_AVX512 __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")))
#endif

namespace engine {

enum class Isa { portable, avx2, avx512 };

// The widest this processor has, or the one that the environment variable ENGINE_ISA names, read at every call. Throws
// std::invalid_argument when it names none, or one the processor lacks. One result may differ in rounding from the
// other's: ask once per operator call.
Isa isa();

const char* name(Isa isa);

}  // namespace engine
