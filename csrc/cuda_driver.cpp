#include "cuda_driver.h"

#include <dlfcn.h>

#include <map>
#include <mutex>

namespace engine {
namespace cuda {
namespace {

// Declared here, as the toolkit's headers are not to be had everywhere. The driver's interface is stable.
using Result = int;
using Device = int;
using Handle = struct Opaque*;

constexpr Result kSuccess = 0;
constexpr int kMaxSharedBytesOptIn = 97;  // CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
constexpr int kFunctionSharedBytes = 1;   // CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES
constexpr int kFunctionMaxDynamic = 8;    // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES

class Driver {
 public:
  // Throws Error where there is no driver.
  static const Driver& get() {
    static const Driver driver;
    return driver;
  }

  void check(Result result, const char* what) const {
    if (result == kSuccess) return;
    const char* name = nullptr;
    if (get_error_name(result, &name) != kSuccess || name == nullptr) name = "an unknown error";
    throw Error(std::string(what) + ": " + name);
  }

  Result (*initialize)(unsigned);
  Result (*get_error_name)(Result, const char**);
  Result (*get_device)(Device*, int);
  Result (*get_device_attribute)(int*, int, Device);
  Result (*retain_primary_context)(Handle*, Device);
  Result (*get_current_context)(Handle*);
  Result (*push_context)(Handle);
  Result (*pop_context)(Handle*);
  Result (*load_data)(Handle*, const void*);
  Result (*get_function)(Handle*, Handle, const char*);
  Result (*get_function_attribute)(int*, int, Handle);
  Result (*set_function_attribute)(Handle, int, int);
  Result (*launch_kernel)(Handle, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, Handle, void**,
                          void**);
  Result (*launch_cooperative_kernel)(Handle, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                                      Handle, void**);

 private:
  Driver() {
    library_ = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library_ == nullptr) throw Error("no CUDA driver (libcuda.so.1 cannot be opened)");
    find(initialize, "cuInit");
    find(get_error_name, "cuGetErrorName");
    find(get_device, "cuDeviceGet");
    find(get_device_attribute, "cuDeviceGetAttribute");
    find(retain_primary_context, "cuDevicePrimaryCtxRetain");
    find(get_current_context, "cuCtxGetCurrent");
    find(push_context, "cuCtxPushCurrent_v2");
    find(pop_context, "cuCtxPopCurrent_v2");
    find(load_data, "cuModuleLoadData");
    find(get_function, "cuModuleGetFunction");
    find(get_function_attribute, "cuFuncGetAttribute");
    find(set_function_attribute, "cuFuncSetAttribute");
    find(launch_kernel, "cuLaunchKernel");
    find(launch_cooperative_kernel, "cuLaunchCooperativeKernel");
    check(initialize(0), "cuInit");
  }

  template <typename Function>
  void find(Function& function, const char* name) {
    function = reinterpret_cast<Function>(dlsym(library_, name));
    if (function == nullptr) throw Error(std::string("the CUDA driver is too old (it has no ") + name + ")");
  }

  void* library_;
};

// The context that torch and everything else uses on a device. Retained once and never released: it lives as long as
// the process.
Handle primary_context(const Driver& driver, int device) {
  static std::mutex mutex;
  static std::map<int, Handle> contexts;
  const std::lock_guard<std::mutex> lock(mutex);
  Handle& context = contexts[device];
  if (context == nullptr) {
    Device number = 0;
    driver.check(driver.get_device(&number, device), "cuDeviceGet");
    driver.check(driver.retain_primary_context(&context, number), "cuDevicePrimaryCtxRetain");
  }
  return context;
}

// Makes a device the calling thread's for as long as it lives.
class OnDevice {
 public:
  OnDevice(const Driver& driver, int device) : driver_(driver) {
    const Handle context = primary_context(driver, device);
    Handle before = nullptr;
    driver.check(driver.get_current_context(&before), "cuCtxGetCurrent");
    if (before == context) return;
    driver.check(driver.push_context(context), "cuCtxPushCurrent");
    pushed_ = true;
  }
  ~OnDevice() {
    Handle context = nullptr;
    if (pushed_) driver_.pop_context(&context);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  const Driver& driver_;
  bool pushed_ = false;
};

}  // namespace

std::uintptr_t load_module(int device, const char* image) {
  const Driver& driver = Driver::get();
  const OnDevice on_device(driver, device);
  Handle module = nullptr;
  driver.check(driver.load_data(&module, image), "cuModuleLoadData");
  return reinterpret_cast<std::uintptr_t>(module);
}

std::uintptr_t find_kernel(int device, std::uintptr_t module, const std::string& name) {
  const Driver& driver = Driver::get();
  const OnDevice on_device(driver, device);
  Handle kernel = nullptr;
  driver.check(driver.get_function(&kernel, reinterpret_cast<Handle>(module), name.c_str()), name.c_str());

  Device number = 0;
  int available = 0, used = 0;
  driver.check(driver.get_device(&number, device), "cuDeviceGet");
  driver.check(driver.get_device_attribute(&available, kMaxSharedBytesOptIn, number), "cuDeviceGetAttribute");
  driver.check(driver.get_function_attribute(&used, kFunctionSharedBytes, kernel), "cuFuncGetAttribute");
  driver.check(driver.set_function_attribute(kernel, kFunctionMaxDynamic, available - used), "cuFuncSetAttribute");
  return reinterpret_cast<std::uintptr_t>(kernel);
}

void launch(int device, std::uintptr_t kernel, const Shape& shape, std::uintptr_t stream, bool cooperative,
            void** arguments) {
  const Driver& driver = Driver::get();
  const OnDevice on_device(driver, device);
  const Handle function = reinterpret_cast<Handle>(kernel), queue = reinterpret_cast<Handle>(stream);
  const auto& [grid, block, shared_bytes] = shape;
  if (cooperative) {
    driver.check(driver.launch_cooperative_kernel(function, grid[0], grid[1], grid[2], block[0], block[1], block[2],
                                                  shared_bytes, queue, arguments),
                 "cuLaunchCooperativeKernel");
  } else {
    driver.check(driver.launch_kernel(function, grid[0], grid[1], grid[2], block[0], block[1], block[2], shared_bytes,
                                      queue, arguments, nullptr),
                 "cuLaunchKernel");
  }
}

}  // namespace cuda
}  // namespace engine
