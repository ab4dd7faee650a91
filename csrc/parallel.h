// Work shared among threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace engine {

// Calls body(begin, end) for [0, grain), [grain, 2 * grain), ... up to `count`, at most `threads` calls at a time.
//
// The blocks are the same for any number of threads, so a body that writes only what belongs to its block gives the
// same bits for any. Who is free takes the next block: a thread that loses its core to another process delays one
// block, not the whole. One block runs without starting a thread; choose `grain` worth more than that (some 20 us).
// The first exception of a body is rethrown here once all have stopped.
template <typename Body>
void parallel_for(std::int64_t count, std::int64_t grain, int threads, const Body& body) {
  const std::int64_t blocks = count <= 0 ? 0 : (count - 1) / grain + 1;
  std::atomic<std::int64_t> next{0};
  std::mutex failing;
  std::exception_ptr failure;

  const auto work = [&] {
    try {
      for (std::int64_t block = next++; block < blocks; block = next++) {
        body(block * grain, std::min(count, (block + 1) * grain));
      }
    } catch (...) {
      next = blocks;
      const std::lock_guard<std::mutex> lock(failing);
      if (!failure) failure = std::current_exception();
    }
  };

  std::vector<std::thread> others;
  const std::int64_t workers = std::min<std::int64_t>(threads, blocks);
  others.reserve(static_cast<std::size_t>(std::max<std::int64_t>(workers, 0)));
  try {
    for (std::int64_t other = 1; other < workers; ++other) others.emplace_back(work);
  } catch (const std::system_error&) {
    // No more threads to be had: those there are do the work.
  }
  work();
  for (std::thread& other : others) other.join();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace engine
