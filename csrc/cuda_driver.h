// CUDA's driver: loads and starts kernels. Its library is opened at the first call, so that engine._C needs none.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace engine {
namespace cuda {

// What the driver answered where that was an error, by the driver's name for it (CUDA_ERROR_...).
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Loads an image (a cubin, a fatbin or PTX, ended by a zero byte) on a device. It is never unloaded.
std::uintptr_t load_module(int device, const char* image);

// A kernel of a module that was loaded on the device. Beyond the 48 KB that every kernel may use, it gets as much
// dynamic shared memory as the device has.
std::uintptr_t find_kernel(int device, std::uintptr_t module, const std::string& name);

struct Shape {
  unsigned grid[3], block[3], shared_bytes;
};

// Starts a kernel on a stream of the device. `arguments` are the addresses of the kernel's arguments.
void launch(int device, std::uintptr_t kernel, const Shape& shape, std::uintptr_t stream, bool cooperative,
            void** arguments);

}  // namespace cuda
}  // namespace engine
