// CUDA kernels on the CPU. emulated.py compiles a .cu file behind this header; the threads of a block are fibers, which
// change places only where they wait for each other. Between two barriers warps run one after the other, and so do
// lanes between two exchanges, in ascending or in descending order: what differs between the two is a race. Blocks run
// one after the other, those of a cooperative launch at once, each on a thread of its own.
//
// What the hardware leaves undefined is an error: a barrier that part of a block does not reach, or reaches elsewhere;
// a shuffle that lanes of its mask do not take part in, or that reads a lane outside of it.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

// emulated.py rewrites __global__, __shared__ and extern __shared__ itself.
#define __device__
#define __host__
#define __forceinline__ inline
#define __constant__ static
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace emulator {

constexpr std::size_t kStackBytes = 1 << 17;
constexpr int kWarpLanes = 32;
constexpr std::uint32_t kAllLanes = 0xffffffffu;

struct Fiber {
  enum class State { ready, block, warp, pausing, ended };

  State state = State::ready;
  int line = 0;  // where it waits
  dim3 thread;
  unsigned number = 0, lane = 0;
  bool started = false;
  ucontext_t entry;
  jmp_buf place;

  // What it brought to the exchange it waits in, and what it takes from there.
  std::uint32_t mask = 0, voters = 0;
  std::uint64_t value = 0;
  unsigned source = 0;
};

class Block;
inline thread_local Block* current = nullptr;

[[noreturn]] inline void fail(const std::string& what) { throw std::runtime_error(what); }

class Block {
 public:
  struct alignas(16) Line {
    char bytes[16];
  };

  Block(dim3 grid, dim3 size, std::size_t shared_bytes, bool descending)
      : grid(grid), size(size), shared(shared_bytes / sizeof(Line) + 1), descending_(descending) {
    const unsigned count = size.x * size.y * size.z;
    fibers_.resize(count);
    stride_ = kStackBytes + static_cast<std::size_t>(getpagesize());
    stacks_ = static_cast<char*>(
        mmap(nullptr, count * stride_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (stacks_ == MAP_FAILED) fail("no memory for the stacks of a block");
    for (unsigned number = 0; number < count; ++number) {
      Fiber& fiber = fibers_[number];
      fiber.number = number;
      fiber.lane = number % kWarpLanes;
      fiber.thread = {number % size.x, number / size.x % size.y, number / (size.x * size.y)};
      mprotect(stacks_ + number * stride_, stride_ - kStackBytes, PROT_NONE);  // an overflow ends the process
    }
  }
  ~Block() { munmap(stacks_, fibers_.size() * stride_); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  void run(dim3 index, const std::function<void()>& body) {
    this->index = index;
    body_ = &body;
    current = this;
    std::memset(shared.data(), 0xa5, shared.size() * sizeof(Line));  // nothing may count on what is there
    for (Fiber& fiber : fibers_) fiber.state = Fiber::State::ready;
    while (step()) {
    }
    current = nullptr;
  }

  Fiber& running() { return fibers_[running_]; }

  // Lets the others run, until what is waited for has come.
  void wait(Fiber::State state, int line) {
    running().state = state;
    running().line = line;
    if (!_setjmp(running().place)) _longjmp(scheduler_, 1);
    if (failing_) throw Stop();
  }

  dim3 grid, size, index;
  std::vector<Line> shared;

 private:
  struct Stop {};  // ends a fiber when another one has failed

  using State = Fiber::State;

  // Every warp in its turn goes as far as it can without the others. False once all fibers have ended.
  bool step() {
    bool moved = false, live = false;
    for (Fiber& fiber : fibers_) {
      if (fiber.state == State::pausing) fiber.state = State::ready;
    }
    const unsigned count = static_cast<unsigned>(fibers_.size()), warps = (count + kWarpLanes - 1) / kWarpLanes;
    for (unsigned turn = 0; turn < warps; ++turn) {
      const unsigned first = kWarpLanes * (descending_ ? warps - 1 - turn : turn);
      while (run_warp(first, std::min<unsigned>(kWarpLanes, count - first))) moved = true;
    }
    moved |= release_block();
    for (const Fiber& fiber : fibers_) live |= fiber.state != State::ended;
    if (live && !moved) give_up();
    return live;
  }

  // Once each lane that can go on. False where there is none, nor any that could be let go on.
  bool run_warp(unsigned first, unsigned lanes) {
    bool moved = false;
    for (unsigned turn = 0; turn < lanes; ++turn) {
      Fiber& fiber = fibers_[first + (descending_ ? lanes - 1 - turn : turn)];
      if (fiber.state != State::ready) continue;
      resume(fiber);
      moved = true;
    }
    return release_warp(first, lanes) || moved;
  }

  void resume(Fiber& fiber) {
    running_ = fiber.number;
    if (!_setjmp(scheduler_)) {
      if (fiber.started) _longjmp(fiber.place, 1);
      fiber.started = true;
      getcontext(&fiber.entry);
      fiber.entry.uc_stack.ss_sp = stacks_ + fiber.number * stride_ + (stride_ - kStackBytes);
      fiber.entry.uc_stack.ss_size = kStackBytes;
      fiber.entry.uc_link = nullptr;
      makecontext(&fiber.entry, &Block::enter, 0);
      setcontext(&fiber.entry);
    }
    if (failure_ && !failing_) stop();
  }

  // The life of a fiber: the same thread of one block after the other.
  static void enter() {
    Block* const block = current;
    for (;;) {
      try {
        if (!block->failing_) (*block->body_)();
      } catch (const Stop&) {
      } catch (...) {
        block->failure_ = std::current_exception();
      }
      block->running().state = State::ended;
      if (!_setjmp(block->running().place)) _longjmp(block->scheduler_, 1);
    }
  }

  bool release_block() {
    for (const Fiber& fiber : fibers_) {
      if (fiber.state != State::block || fiber.line != fibers_[0].line) return false;
    }
    std::uint32_t votes = 0;
    for (const Fiber& fiber : fibers_) votes += fiber.value != 0;
    for (Fiber& fiber : fibers_) {
      fiber.voters = votes;
      fiber.state = State::ready;
    }
    return true;
  }

  // Those of a warp who wait in one exchange go on once all lanes of its mask that have not ended are there.
  bool release_warp(unsigned first, unsigned lanes) {
    Fiber* const warp = fibers_.data() + first;
    bool released = false;
    for (unsigned leader = 0; leader < lanes; ++leader) {
      if (warp[leader].state != State::warp) continue;
      const std::uint32_t mask = warp[leader].mask;
      std::uint32_t arrived = 0, expected = 0, votes = 0;
      for (unsigned lane = 0; lane < lanes; ++lane) {
        const std::uint32_t bit = mask & 1u << lane;
        const bool here =
            warp[lane].state == State::warp && warp[lane].mask == mask && warp[lane].line == warp[leader].line;
        if (warp[lane].state != State::ended) expected |= bit;
        if (here) arrived |= bit;
        if (here && warp[lane].value) votes |= bit;
      }
      if (arrived != expected) continue;
      std::uint64_t taken[kWarpLanes] = {};
      for (unsigned lane = 0; lane < lanes; ++lane) {
        if (!(arrived & 1u << lane)) continue;
        if (!(arrived & 1u << warp[lane].source)) {
          give_up("lane " + std::to_string(lane) + " reads lane " + std::to_string(warp[lane].source) +
                  ", which takes no part, in line " + std::to_string(warp[lane].line));
        }
        taken[lane] = warp[warp[lane].source].value;
      }
      for (unsigned lane = 0; lane < lanes; ++lane) {
        if (!(arrived & 1u << lane)) continue;
        warp[lane].value = taken[lane];
        warp[lane].voters = votes;
        warp[lane].state = State::ready;
      }
      released = true;
    }
    return released;
  }

  [[noreturn]] void give_up(std::string what = "") {
    if (what.empty()) {
      const char* names[] = {"", "__syncthreads in line ", "a warp function in line "};
      for (const State state : {State::block, State::warp, State::ended}) {
        for (const Fiber& fiber : fibers_) {
          if (fiber.state != state) continue;
          if (!what.empty()) what += ", ";
          what += "thread " + std::to_string(fiber.number);
          what += state == State::ended
                      ? " has ended"
                      : std::string(" waits in ") + names[static_cast<int>(state)] + std::to_string(fiber.line);
          if (fiber.number + 1 < fibers_.size() && what.size() > 200) {
            what += ", ...";
            break;
          }
        }
      }
    }
    failure_ = std::make_exception_ptr(std::runtime_error("block (" + std::to_string(index.x) + ", " +
                                                          std::to_string(index.y) + ", " + std::to_string(index.z) +
                                                          "): " + what));
    stop();
  }

  // Unwinds every fiber, then throws what made one fail.
  [[noreturn]] void stop() {
    failing_ = true;
    for (Fiber& fiber : fibers_) {
      if (fiber.started && fiber.state != State::ended) resume(fiber);
    }
    failing_ = false;
    current = nullptr;
    std::rethrow_exception(std::exchange(failure_, nullptr));
  }

  const bool descending_;
  std::vector<Fiber> fibers_;
  std::size_t stride_ = 0;
  char* stacks_ = nullptr;
  unsigned running_ = 0;
  jmp_buf scheduler_;
  const std::function<void()>* body_ = nullptr;
  std::exception_ptr failure_;
  bool failing_ = false;
};

// The meeting of the lanes of a warp: brings a value, returns that of a source lane.
inline std::uint64_t exchange(std::uint32_t mask, std::uint64_t value, unsigned source, int line) {
  Fiber& fiber = current->running();
  if (!(mask & 1u << fiber.lane)) {
    fail("lane " + std::to_string(fiber.lane) + " is not in its own mask, in line " + std::to_string(line));
  }
  fiber.mask = mask;
  fiber.value = value;
  fiber.source = source;
  current->wait(Fiber::State::warp, line);
  return fiber.value;
}

inline std::uint32_t vote(std::uint32_t mask, bool yes, int line) {
  exchange(mask, yes, current->running().lane, line);
  return current->running().voters;
}

template <typename T>
T shuffle(std::uint32_t mask, T value, int source, int line) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(mask, bits, static_cast<unsigned>(source), line);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// Votes are counted over all fibers of the block.
inline int meet(bool yes, int line) {
  current->running().value = yes;
  current->wait(Fiber::State::block, line);
  return static_cast<int>(current->running().voters);
}

template <typename... Parameters, std::size_t... places>
void call(void (*kernel)(Parameters...), const void* const* arguments, std::index_sequence<places...>) {
  kernel(*static_cast<const Parameters*>(arguments[places])...);
}

inline dim3 at(dim3 size, unsigned number) {
  return {number % size.x, number / size.x % size.y, number / (size.x * size.y)};
}

struct Launch {
  unsigned grid[3], block[3];
  std::size_t shared_bytes;
  bool cooperative, descending;
  const void* const* arguments;  // as for cuLaunchKernel
  const std::size_t* sizes;      // bytes of each
  std::size_t count;
};

inline std::string mismatch(const Launch& launch, const std::vector<std::size_t>& expected) {
  if (launch.count != expected.size()) {
    return "takes " + std::to_string(expected.size()) + " arguments, got " + std::to_string(launch.count);
  }
  for (std::size_t place = 0; place < launch.count; ++place) {
    if (launch.sizes[place] != expected[place]) {
      return "takes " + std::to_string(expected[place]) + " bytes as argument " + std::to_string(place) + ", got " +
             std::to_string(launch.sizes[place]);
    }
  }
  return "";
}

// Runs every thread of a grid. Returns what went wrong, or "".
template <typename... Parameters>
const char* run(void (*kernel)(Parameters...), const Launch& launch) {
  static thread_local std::string failure;
  failure = mismatch(launch, {sizeof(Parameters)...});
  if (!failure.empty()) return failure.c_str();
  const dim3 grid{launch.grid[0], launch.grid[1], launch.grid[2]};
  const dim3 size{launch.block[0], launch.block[1], launch.block[2]};
  const unsigned blocks = grid.x * grid.y * grid.z;
  const std::function<void()> body = [&] { call(kernel, launch.arguments, std::index_sequence_for<Parameters...>()); };
  std::mutex failing;
  std::string& first_failure = failure;  // not that of another thread
  const auto run_blocks = [&](unsigned begin, unsigned end) {
    try {
      Block block(grid, size, launch.shared_bytes, launch.descending);
      for (unsigned number = begin; number < end; ++number) block.run(at(grid, number), body);
    } catch (const std::exception& error) {
      const std::lock_guard<std::mutex> lock(failing);
      if (first_failure.empty()) first_failure = error.what();
    }
  };
  if (launch.cooperative) {
    std::vector<std::thread> threads;
    for (unsigned number = 0; number < blocks; ++number) threads.emplace_back(run_blocks, number, number + 1);
    for (std::thread& thread : threads) thread.join();
  } else {
    run_blocks(0, blocks);
  }
  return failure.c_str();
}

// Threads of other blocks, too, may be in the way of a thread that waits for them.
inline void let_others_run() {
  current->wait(Fiber::State::pausing, 0);
  std::this_thread::yield();
}

}  // namespace emulator

#define threadIdx (emulator::current->running().thread)
#define blockIdx (emulator::current->index)
#define blockDim (emulator::current->size)
#define gridDim (emulator::current->grid)
constexpr int warpSize = emulator::kWarpLanes;

#define EMULATOR_LINE int line = __builtin_LINE()

inline void __syncthreads(EMULATOR_LINE) { emulator::meet(true, line); }
inline int __syncthreads_count(int yes, EMULATOR_LINE) { return emulator::meet(yes, line); }
inline int __syncthreads_or(int yes, EMULATOR_LINE) { return emulator::meet(yes, line) > 0; }
inline int __syncthreads_and(int yes, EMULATOR_LINE) { return emulator::meet(!yes, line) == 0; }
inline void __syncwarp(unsigned mask = emulator::kAllLanes, EMULATOR_LINE) { emulator::vote(mask, false, line); }

inline unsigned __ballot_sync(unsigned mask, int yes, EMULATOR_LINE) { return emulator::vote(mask, yes, line); }
inline int __any_sync(unsigned mask, int yes, EMULATOR_LINE) { return emulator::vote(mask, yes, line) != 0; }
inline int __all_sync(unsigned mask, int yes, EMULATOR_LINE) { return emulator::vote(mask, !yes, line) == 0; }

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, EMULATOR_LINE) {
  const int lane = static_cast<int>(emulator::current->running().lane);
  return emulator::shuffle(mask, value, (lane & ~(width - 1)) + (source & (width - 1)), line);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = warpSize, EMULATOR_LINE) {
  const int lane = static_cast<int>(emulator::current->running().lane), source = lane - static_cast<int>(distance);
  return emulator::shuffle(mask, value, source < (lane & ~(width - 1)) ? lane : source, line);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = warpSize, EMULATOR_LINE) {
  const int lane = static_cast<int>(emulator::current->running().lane), source = lane + static_cast<int>(distance);
  return emulator::shuffle(mask, value, source > (lane | (width - 1)) ? lane : source, line);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = warpSize, EMULATOR_LINE) {
  const int lane = static_cast<int>(emulator::current->running().lane), source = lane ^ lanes;
  return emulator::shuffle(mask, value, source > (lane | (width - 1)) ? lane : source, line);
}

// Atomics hold between the threads of a cooperative launch, too.
template <typename T, typename Change>
T emulated_atomic(T* address, const Change& change) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  const T old = *static_cast<volatile T*>(address);
  *static_cast<volatile T*>(address) = change(old);
  return old;
}

// The second type follows from the first, as that of CUDA's overloads does.
template <typename T>
struct Same {
  using Type = T;
};
template <typename T>
using AsFirst = typename Same<T>::Type;

template <typename T>
T atomicAdd(T* address, AsFirst<T> value) {
  return emulated_atomic(address, [=](T old) { return static_cast<T>(old + value); });
}
template <typename T>
T atomicSub(T* address, AsFirst<T> value) {
  return emulated_atomic(address, [=](T old) { return static_cast<T>(old - value); });
}
template <typename T>
T atomicMin(T* address, AsFirst<T> value) {
  return emulated_atomic(address, [=](T old) { return old < value ? old : value; });
}
template <typename T>
T atomicMax(T* address, AsFirst<T> value) {
  return emulated_atomic(address, [=](T old) { return old > value ? old : value; });
}
template <typename T>
T atomicOr(T* address, AsFirst<T> value) {
  return emulated_atomic(address, [=](T old) { return static_cast<T>(old | value); });
}
template <typename T>
T atomicAnd(T* address, AsFirst<T> value) {
  return emulated_atomic(address, [=](T old) { return static_cast<T>(old & value); });
}
template <typename T>
T atomicExch(T* address, AsFirst<T> value) {
  return emulated_atomic(address, [=](T) { return value; });
}
template <typename T>
T atomicCAS(T* address, AsFirst<T> expected, AsFirst<T> value) {
  return emulated_atomic(address, [=](T old) { return old == expected ? value : old; });
}

inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __nanosleep(unsigned) { emulator::let_others_run(); }

template <typename T>
T __ldg(const T* address) {
  return *address;
}
template <typename T>
T __ldcg(const T* address) {
  return *address;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __popcll(unsigned long long bits) { return __builtin_popcountll(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __ffsll(long long bits) { return __builtin_ffsll(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }
inline int __clzll(long long bits) { return bits == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(bits)); }
inline unsigned __brev(unsigned bits) {
  unsigned reversed = 0;
  for (int place = 0; place < 32; ++place) reversed |= (bits >> place & 1u) << (31 - place);
  return reversed;
}

template <typename Target, typename Source>
Target emulated_cast(Source value) {
  static_assert(sizeof(Target) == sizeof(Source), "a cast keeps all bits");
  Target target;
  std::memcpy(&target, &value, sizeof(target));
  return target;
}
inline float __int_as_float(int bits) { return emulated_cast<float>(bits); }
inline float __uint_as_float(unsigned bits) { return emulated_cast<float>(bits); }
inline int __float_as_int(float value) { return emulated_cast<int>(value); }
inline unsigned __float_as_uint(float value) { return emulated_cast<unsigned>(value); }
inline double __longlong_as_double(long long bits) { return emulated_cast<double>(bits); }
inline long long __double_as_longlong(double value) { return emulated_cast<long long>(value); }

using std::isfinite;
using std::isinf;
using std::isnan;
template <typename One, typename Other>
std::common_type_t<One, Other> min(One one, Other other) {
  return other < one ? other : one;
}
template <typename One, typename Other>
std::common_type_t<One, Other> max(One one, Other other) {
  return other > one ? other : one;
}
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline float __frsqrt_rn(float x) { return 1 / std::sqrt(x); }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline double __dadd_rn(double x, double y) { return x + y; }
inline double __dmul_rn(double x, double y) { return x * y; }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1.0f) : 0.0f; }

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) longlong2 {
  long long x, y;
};
struct alignas(16) double2 {
  double x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
