// A CUDA driver without a GPU: accepts the image "good", knows the kernel "kernel", and prints what it is asked for.
#include <cstdint>
#include <cstdio>
#include <cstring>

namespace {
std::uintptr_t current = 0;
}

extern "C" {
int cuInit(unsigned) {
  std::setvbuf(stdout, nullptr, _IONBF, 0);  // in order with what Python prints
  return 0;
}

int cuGetErrorName(int error, const char** name) {
  *name = error == 209 ? "CUDA_ERROR_NO_BINARY_FOR_GPU" : error == 500 ? "CUDA_ERROR_NOT_FOUND" : nullptr;
  return *name ? 0 : 1;
}

int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return ordinal < 2 ? 0 : 101;
}

int cuDeviceGetAttribute(int* value, int attribute, int) {
  *value = attribute == 97 ? 100000 : 0;
  return 0;
}

int cuDevicePrimaryCtxRetain(std::uintptr_t* context, int device) {
  *context = 100u + static_cast<unsigned>(device);
  std::printf("retain %d\n", device);
  return 0;
}

int cuCtxGetCurrent(std::uintptr_t* context) {
  *context = current;
  return 0;
}

int cuCtxPushCurrent_v2(std::uintptr_t context) {
  current = context;
  return 0;
}

int cuCtxPopCurrent_v2(std::uintptr_t* context) {
  *context = current;
  current = 0;
  return 0;
}

int cuModuleLoadData(std::uintptr_t* module, const char* image) {
  *module = 7;
  return std::strcmp(image, "good") ? 209 : 0;
}

int cuModuleGetFunction(std::uintptr_t* function, std::uintptr_t module, const char* name) {
  *function = module + 1;
  return std::strcmp(name, "kernel") ? 500 : 0;
}

int cuFuncGetAttribute(int* value, int attribute, std::uintptr_t) {
  *value = attribute == 1 ? 1000 : 0;
  return 0;
}

int cuFuncSetAttribute(std::uintptr_t, int attribute, int value) {
  std::printf("attribute %d: %d\n", attribute, value);
  return 0;
}

// The kernel takes an int64, a float, a bool and an address.
int cuLaunchKernel(std::uintptr_t function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                   unsigned block_y, unsigned block_z, unsigned shared_bytes, std::uintptr_t stream, void** arguments,
                   void**) {
  std::printf("launch %ld in %ld: %u %u %u, %u %u %u, %u bytes, stream %ld: %ld %g %d %ld\n",
              static_cast<long>(function), static_cast<long>(current), grid_x, grid_y, grid_z, block_x, block_y,
              block_z, shared_bytes, static_cast<long>(stream), static_cast<long>(*static_cast<std::int64_t*>(arguments[0])),
              static_cast<double>(*static_cast<float*>(arguments[1])), *static_cast<bool*>(arguments[2]),
              static_cast<long>(*static_cast<std::int64_t*>(arguments[3])));
  return 0;
}

int cuLaunchCooperativeKernel(std::uintptr_t, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                              std::uintptr_t, void**) {
  std::printf("cooperative launch\n");
  return 720;
}
}
