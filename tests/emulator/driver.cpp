// The driver but for its memory and queues: devices, contexts, modules and launches.
#include "emulator.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <set>

#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#define EMULATOR_RUNTIME
#include "kernel.h"

namespace emulator {

static thread_local Device* current = nullptr;

Device* current_device() { return current; }

static Device* find_device(int ordinal) {
    auto& devices = state().devices;
    return state().initialized && ordinal >= 0 && size_t(ordinal) < devices.size() ? devices[ordinal].get() : nullptr;
}

Device* find_context(void* handle) {
    for (auto& device : state().devices)
        if (device.get() == handle) return device.get();
    return nullptr;
}

static uint64_t setting(const char* name, uint64_t otherwise) {
    const char* text = getenv(name);
    return text && *text ? strtoull(text, nullptr, 10) : otherwise;
}

int library_version(const char* name) { return int(setting(name, 13000)); }

std::string library_folder() {
    Dl_info info;
    dladdr(reinterpret_cast<void*>(&library_folder), &info);
    std::string path = info.dli_fname;
    size_t slash = path.rfind('/');
    path = slash == std::string::npos ? "." : path.substr(0, slash);
    char* absolute = realpath(path.c_str(), nullptr);
    if (absolute) path = absolute;
    free(absolute);
    return path;
}

// ---- modules

struct Module {
    void* library;
    int device;
};

struct Function {
    const Kernel* kernel;
    const char* options;
    int device;
    unsigned dynamic_limit = 48 << 10;
};

static constexpr unsigned largest_dynamic = 232448;
static auto& modules = *new std::unordered_map<void*, std::unique_ptr<Module>>;
static auto& functions = *new std::unordered_map<void*, std::unique_ptr<Function>>;  // both guarded by state().mutex

static Function* find_function(void* handle) {
    std::lock_guard lock(state().mutex);
    auto found = functions.find(handle);
    return found == functions.end() ? nullptr : found->second.get();
}

}  // namespace emulator

using namespace emulator;

// ---- devices

API int cuInit(unsigned flags) {
    if (flags) return invalid_value;
    std::lock_guard lock(state().mutex);
    if (!state().initialized) {
        uint64_t count = setting("EMULATOR_GPUS", 2), memory = setting("EMULATOR_MEMORY", uint64_t(4) << 30);
        for (uint64_t i = 0; i < count; i++) {
            auto device = std::make_unique<Device>();
            device->ordinal = int(i);
            device->total = memory;
            device->stream = Stream::start(int(i));
            state().streams[device->stream.get()] = device->stream;
            state().devices.push_back(std::move(device));
        }
        state().initialized = true;
    }
    return state().devices.empty() ? no_device : success;
}

API int cuDriverGetVersion(int* version) {
    if (!version) return invalid_value;
    *version = library_version("EMULATOR_DRIVER");
    return success;
}

API int cuDeviceGetCount(int* count) {
    if (!count) return invalid_value;
    if (!state().initialized) return not_initialized;
    *count = int(state().devices.size());
    return success;
}

API int cuDeviceGet(int* device, int ordinal) {
    if (!device) return invalid_value;
    if (!state().initialized) return not_initialized;
    if (!find_device(ordinal)) return invalid_device;
    *device = ordinal;
    return success;
}

API int cuDeviceGetName(char* name, int length, int device) {
    if (!name || length <= 0) return invalid_value;
    if (!find_device(device)) return invalid_device;
    snprintf(name, size_t(length), "Emulated GPU");
    return success;
}

API int cuDeviceTotalMem_v2(size_t* bytes, int device) {
    if (!bytes) return invalid_value;
    if (!find_device(device)) return invalid_device;
    *bytes = find_device(device)->total;
    return success;
}

API int cuDeviceGetUuid_v2(char* uuid, int device) {
    if (!uuid) return invalid_value;
    if (!find_device(device)) return invalid_device;
    memcpy(uuid, "emulated device ", 16);
    uuid[15] = char(device);
    return success;
}

API int cuDeviceGetUuid(char* uuid, int device) { return cuDeviceGetUuid_v2(uuid, device); }

API int cuDeviceGetPCIBusId(char* id, int length, int device) {
    if (!id || length <= 0) return invalid_value;
    if (!find_device(device)) return invalid_device;
    snprintf(id, size_t(length), "0000:%02X:00.0", unsigned(device + 1));
    return success;
}

API int cuDeviceGetAttribute(int* value, int attribute, int device) {
    if (!value || attribute < 1 || attribute > 200) return invalid_value;
    if (!find_device(device)) return invalid_device;
    // The numbers are those of CUdevice_attribute; what is not listed (memory pools: 115) is 0.
    static const std::map<int, int> values = {
        {1, 1024},        // threads per block
        {2, 1024},        // block x, y, z
        {3, 1024},
        {4, 64},
        {5, 0x7fffffff},  // grid x, y, z
        {6, 65535},
        {7, 65535},
        {8, 48 << 10},    // shared memory per block
        {9, 64 << 10},    // constant memory
        {10, 32},         // warp size
        {11, 0x7fffffff}, // pitch
        {12, 65536},      // registers per block
        {13, 1980000},    // clock rate, kHz
        {14, 512},        // texture alignment
        {15, 1},          // overlap of copies and kernels
        {16, 4},          // multiprocessors
        {19, 1},          // can map host memory
        {31, 1},          // concurrent kernels
        {36, 2619000},    // memory clock, kHz
        {37, 5120},       // bus width, bits
        {38, 50 << 20},   // level 2 cache
        {39, 2048},       // threads per multiprocessor
        {40, 3},          // copy engines
        {41, 1},          // unified addressing
        {75, 9},          // compute capability
        {76, 0},
        {78, 1},          // stream priorities
        {79, 1},          // global and local level 1 cache
        {80, 1},
        {81, 233472},     // shared memory per multiprocessor
        {82, 65536},      // registers per multiprocessor
        {90, 1},          // preemption
        {97, int(largest_dynamic)},
        {106, 32},        // blocks per multiprocessor
        {111, 1024},      // shared memory reserved per block
    };
    auto found = values.find(attribute);
    *value = found == values.end() ? 0 : found->second;
    if (attribute == 33) *value = device + 1;  // PCI bus
    return success;
}

API int cuDeviceCanAccessPeer(int* can, int device, int peer) {
    if (!can) return invalid_value;
    if (!find_device(device) || !find_device(peer)) return invalid_device;
    *can = device != peer && setting("EMULATOR_PEER", 1) != 0;
    return success;
}

// Memory pools exist as far as their release threshold; MEMORY_POOLS_SUPPORTED says 0, so cudarc does not use them.
API int cuDeviceGetDefaultMemPool(void** pool, int device) {
    if (!pool) return invalid_value;
    if (!find_device(device)) return invalid_device;
    *pool = find_device(device);
    return success;
}
API int cuDeviceGetMemPool(void** pool, int device) { return cuDeviceGetDefaultMemPool(pool, device); }
API int cuMemPoolSetAttribute(void* pool, int attribute, void* value) {
    Device* device = find_context(pool);
    if (!device || !value) return invalid_value;
    if (attribute == 4) device->pool_threshold = *static_cast<uint64_t*>(value);
    return success;
}
API int cuMemPoolGetAttribute(void* pool, int attribute, void* value) {
    Device* device = find_context(pool);
    if (!device || !value) return invalid_value;
    if (attribute <= 3) {
        *static_cast<int*>(value) = 1;
    } else {
        *static_cast<uint64_t*>(value) = attribute == 4 ? device->pool_threshold : used_memory(device);
    }
    return success;
}
API int cuMemPoolTrimTo(void* pool, size_t) { return find_context(pool) ? success : invalid_value; }

// ---- contexts: each device has its primary one, whose handle is the device's own address

API int cuDevicePrimaryCtxRetain(void** context, int device) {
    if (!context) return invalid_value;
    if (!find_device(device)) return state().initialized ? invalid_device : not_initialized;
    if (int status = refuse_in_capture()) return status;
    std::lock_guard lock(state().mutex);
    find_device(device)->retained++;
    *context = find_device(device);
    return success;
}

API int cuDevicePrimaryCtxRelease_v2(int device) {
    if (!find_device(device)) return invalid_device;
    if (int status = refuse_in_capture()) return status;
    std::lock_guard lock(state().mutex);
    if (find_device(device)->retained == 0) return invalid_context;
    // The context stays usable: nothing is torn down before the process ends.
    find_device(device)->retained--;
    return success;
}

API int cuCtxSetCurrent(void* context) {
    if (!state().initialized) return not_initialized;
    if (context && !find_context(context)) return invalid_context;
    current = find_context(context);
    return success;
}

API int cuCtxGetCurrent(void** context) {
    if (!context) return invalid_value;
    if (!state().initialized) return not_initialized;
    *context = current;
    return success;
}

API int cuCtxGetDevice(int* device) {
    if (!device) return invalid_value;
    if (!current) return invalid_context;
    *device = current->ordinal;
    return success;
}

API int cuCtxSetFlags(unsigned) { return current ? success : invalid_context; }
API int cuCtxSetCacheConfig(int) { return current ? success : invalid_context; }
API int cuCtxGetCacheConfig(int* config) {
    if (!config) return invalid_value;
    *config = 0;
    return current ? success : invalid_context;
}

static size_t limits[7] = {1024, 1 << 20, 8 << 20, 0, 2048, 128, 0};
API int cuCtxSetLimit(unsigned limit, size_t value) {
    if (!current) return invalid_context;
    if (limit >= std::size(limits)) return unsupported_limit;
    limits[limit] = value;
    return success;
}
API int cuCtxGetLimit(size_t* value, unsigned limit) {
    if (!value) return invalid_value;
    if (!current) return invalid_context;
    if (limit >= std::size(limits)) return unsupported_limit;
    *value = limits[limit];
    return success;
}

API int cuCtxEnablePeerAccess(void* context, unsigned flags) {
    Device* peer = find_context(context);
    if (!current || !peer) return invalid_context;
    if (flags) return invalid_value;
    int can = 0;
    cuDeviceCanAccessPeer(&can, current->ordinal, peer->ordinal);
    if (!can) return peer_access_unsupported;
    if (int status = refuse_in_capture()) return status;
    std::lock_guard lock(state().mutex);
    return current->peers.emplace(peer->ordinal, true).second ? success : peer_access_already_enabled;
}

API int cuCtxDisablePeerAccess(void* context) {
    Device* peer = find_context(context);
    if (!current || !peer) return invalid_context;
    std::lock_guard lock(state().mutex);
    return current->peers.erase(peer->ordinal) ? success : peer_access_not_enabled;
}

// ---- modules and functions

/// Opens machine code, which has its library in itself: a file without a name, once per content, as a module's variables
/// exist once per process.
static void* open_machine_code(const char* code, size_t size) {
    static std::mutex mutex;
    static auto& opened = *new std::unordered_map<std::string, void*>;
    std::lock_guard lock(mutex);
    std::string content(code, size);
    auto found = opened.find(content);
    if (found != opened.end()) return found->second;
    int file = memfd_create("emulated kernels", MFD_CLOEXEC);
    bool written = file >= 0;
    for (size_t at = 0; written && at < size;) {
        ssize_t count = write(file, code + at, size - at);
        written = count > 0;
        at += written ? size_t(count) : 0;
    }
    void* library = nullptr;
    if (written) library = dlopen(("/proc/self/fd/" + std::to_string(file)).c_str(), RTLD_NOW | RTLD_LOCAL);
    // The file stays open, or the next one would have its number, and be taken for it by name.
    if (library) opened.emplace(std::move(content), library);
    return library;
}

API int cuModuleLoadData(void** result, const void* image) {
    if (!result || !image) return invalid_value;
    if (!current) return invalid_context;
    if (int status = refuse_in_capture()) return status;
    // As nvrtc.cpp writes it: a line that says what it is and by which version it was made; then of PTX the path of a
    // shared library, of machine code its size and itself. An older driver takes machine code of its own generation of
    // CUDA only, and PTX of its own version.
    const char* text = static_cast<const char*>(image);
    char kind[16];
    int version, length = 0, driver = library_version("EMULATOR_DRIVER");
    void* library;
    if (sscanf(text, "// emulated %15[PTX]%d%n", kind, &version, &length) == 2 && length) {
        if (version > driver) return 222;  // CUDA_ERROR_UNSUPPORTED_PTX_VERSION
        std::string path(text + length + 1);
        path.resize(std::min(path.size(), path.find('\n')));
        library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    } else if (size_t size; sscanf(text, "// emulated machine code %d\n%zu%n", &version, &size, &length) == 2 && length) {
        if (version / 1000 > driver / 1000) return 209;  // CUDA_ERROR_NO_BINARY_FOR_GPU
        library = open_machine_code(text + length + 1, size);
    } else {
        return invalid_image;
    }
    if (!library) {
        fprintf(stderr, "emulator: %s\n", dlerror());
        return invalid_image;
    }
    auto module = std::make_unique<Module>(Module{library, current->ordinal});
    std::lock_guard lock(state().mutex);
    *result = module.get();
    modules[*result] = std::move(module);
    return success;
}

API int cuModuleLoadDataEx(void** result, const void* image, unsigned, int*, void**) {
    return cuModuleLoadData(result, image);
}

API int cuModuleLoad(void** result, const char* path) {
    if (!result || !path) return invalid_value;
    std::ifstream file(path, std::ios::binary);
    if (!file) return 301;  // CUDA_ERROR_FILE_NOT_FOUND
    std::string text(std::istreambuf_iterator<char>(file), {});
    return cuModuleLoadData(result, text.c_str());
}

API int cuModuleUnload(void* handle) {
    if (int status = refuse_in_capture()) return status;
    // The library stays loaded: kernels of it may still be queued, and loading it again is then free.
    std::lock_guard lock(state().mutex);
    return modules.erase(handle) ? success : invalid_value;
}

API int cuModuleGetFunction(void** result, void* handle, const char* name) {
    if (!result || !name) return invalid_value;
    std::lock_guard lock(state().mutex);
    auto found = modules.find(handle);
    if (found == modules.end()) return invalid_value;
    void* kernel = dlsym(found->second->library, ("emulator_kernel_" + std::string(name)).c_str());
    if (!kernel) return not_found;
    auto function = std::make_unique<Function>();
    function->kernel = static_cast<const Kernel*>(kernel);
    function->options = static_cast<const char*>(dlsym(found->second->library, "emulator_options"));
    function->device = found->second->device;
    *result = function.get();
    functions[*result] = std::move(function);
    return success;
}

API int cuModuleGetGlobal_v2(void** address, size_t* bytes, void* handle, const char* name) {
    if (!name) return invalid_value;
    std::lock_guard lock(state().mutex);
    auto found = modules.find(handle);
    if (found == modules.end()) return invalid_value;
    void* symbol = dlsym(found->second->library, name);
    Dl_info info;
    ElfW(Sym)* entry = nullptr;
    if (!symbol || !dladdr1(symbol, &info, reinterpret_cast<void**>(&entry), RTLD_DL_SYMENT) || !entry)
        return not_found;
    if (address) *address = symbol;
    if (bytes) *bytes = entry->st_size;
    // Copies to and from it pass the same checks as those to allocated memory.
    know_memory(symbol, entry->st_size, found->second->device);
    return success;
}

enum { max_threads = 0, registers = 4, ptx_version = 5, binary_version = 6, max_dynamic = 8, carveout = 9 };

API int cuFuncSetAttribute(void* handle, int attribute, int value) {
    Function* function = find_function(handle);
    if (!function) return invalid_value;
    if (attribute == carveout) return success;
    if (attribute != max_dynamic || value < 0 || unsigned(value) > largest_dynamic) return invalid_value;
    function->dynamic_limit = unsigned(value);
    return success;
}

API int cuFuncGetAttribute(int* value, int attribute, void* handle) {
    Function* function = find_function(handle);
    if (!function || !value || attribute < 0 || attribute > 15) return invalid_value;
    *value = attribute == max_threads      ? int(function->kernel->max_threads)
             : attribute == registers      ? 32
             : attribute == ptx_version    ? 90
             : attribute == binary_version ? 90
             : attribute == max_dynamic    ? int(function->dynamic_limit)
                                           : 0;
    return success;
}

API int cuFuncSetCacheConfig(void* handle, int) { return find_function(handle) ? success : invalid_value; }

API int cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, void* handle, int threads, size_t dynamic,
                                                             unsigned) {
    if (!blocks || !find_function(handle) || threads <= 0) return invalid_value;
    int by_threads = threads > 1024 ? 0 : 2048 / threads, by_memory = int(233472 / (dynamic + 1024));
    *blocks = std::min({by_threads, by_memory, 32});
    return success;
}

API int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void* handle, int threads, size_t dynamic) {
    return cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, handle, threads, dynamic, 0);
}

/// Writes the name of a kernel that is started, and the definitions it was compiled with, to the file that EMULATOR_TRACE
/// names; once per process.
static void trace(const Function& function) {
    static const char* path = getenv("EMULATOR_TRACE");
    if (!path || !*path) return;
    static std::mutex mutex;
    static auto& seen = *new std::set<std::string>;
    std::string line = std::string(function.kernel->name) + (function.options ? function.options : "") + "\n";
    std::lock_guard lock(mutex);
    if (!seen.insert(line).second) return;
    if (FILE* file = fopen(path, "ae")) {
        fputs(line.c_str(), file);
        fclose(file);
    }
}

struct CUlaunchConfig {
    unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes;
    void* stream;
    const void* attributes;
    unsigned attribute_count;
};

API int cuLaunchKernel(void* handle, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                       unsigned block_y, unsigned block_z, unsigned shared_bytes, void* stream_handle, void** values,
                       void** extra) {
    Function* function = find_function(handle);
    auto stream = find_stream(stream_handle);
    if (!function || !stream || extra) return invalid_value;
    if (stream->device != function->device) return invalid_handle;
    const Kernel* kernel = function->kernel;
    uint64_t threads = uint64_t(block_x) * block_y * block_z;
    if (threads < 1 || threads > kernel->max_threads || block_x > 1024 || block_y > 1024 || block_z > 64)
        return invalid_value;
    if (grid_x < 1 || grid_x > 0x7fffffff || grid_y < 1 || grid_y > 65535 || grid_z < 1 || grid_z > 65535)
        return invalid_value;
    if (shared_bytes > function->dynamic_limit) return invalid_value;
    if (kernel->count && !values) return invalid_value;

    // The values are those of now; each in its own 16-byte steps of one buffer.
    size_t steps = 0;
    for (unsigned i = 0; i < kernel->count; i++) {
        if (!values[i]) return invalid_value;
        steps += (kernel->sizes[i] + 15) / 16;
    }
    struct alignas(16) Step {
        char bytes[16];
    };
    auto buffer = std::make_shared<std::vector<Step>>(steps);
    auto pointers = std::make_shared<std::vector<void*>>();
    size_t at = 0;
    for (unsigned i = 0; i < kernel->count; i++) {
        pointers->push_back(buffer->data() + at);
        memcpy(pointers->back(), values[i], kernel->sizes[i]);
        at += (kernel->sizes[i] + 15) / 16;
    }
    trace(*function);
    Launch launch{kernel, {grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared_bytes};
    return enqueue(stream_handle, [=] {
        (void)buffer;  // kept for the pointers into it
        run_kernel(launch, pointers->data());
    });
}

API int cuLaunchKernelEx(const CUlaunchConfig* config, void* handle, void** values, void** extra) {
    // Attributes say what may overlap: here, what follows in a stream comes after.
    if (!config || (config->attribute_count && !config->attributes)) return invalid_value;
    return cuLaunchKernel(handle, config->grid_x, config->grid_y, config->grid_z, config->block_x, config->block_y,
                          config->block_z, config->shared_bytes, config->stream, values, extra);
}

// ---- errors

static const std::map<int, std::pair<const char*, const char*>> errors = {
    {0, {"CUDA_SUCCESS", "no error"}},
    {1, {"CUDA_ERROR_INVALID_VALUE", "invalid argument"}},
    {2, {"CUDA_ERROR_OUT_OF_MEMORY", "out of memory"}},
    {3, {"CUDA_ERROR_NOT_INITIALIZED", "initialization error"}},
    {100, {"CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"}},
    {101, {"CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"}},
    {200, {"CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"}},
    {201, {"CUDA_ERROR_INVALID_CONTEXT", "invalid device context"}},
    {215, {"CUDA_ERROR_UNSUPPORTED_LIMIT", "limit is not supported on this architecture"}},
    {217, {"CUDA_ERROR_PEER_ACCESS_UNSUPPORTED", "peer access is not supported between these two devices"}},
    {301, {"CUDA_ERROR_FILE_NOT_FOUND", "file not found"}},
    {400, {"CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"}},
    {401, {"CUDA_ERROR_ILLEGAL_STATE", "the operation cannot be performed in the present state"}},
    {500, {"CUDA_ERROR_NOT_FOUND", "named symbol not found"}},
    {600, {"CUDA_ERROR_NOT_READY", "device not ready"}},
    {704, {"CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED", "peer access is already enabled"}},
    {705, {"CUDA_ERROR_PEER_ACCESS_NOT_ENABLED", "peer access has not been enabled"}},
    {801, {"CUDA_ERROR_NOT_SUPPORTED", "operation not supported"}},
    {900, {"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"}},
    {901, {"CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", "operation failed due to a previous error during capture"}},
    {903, {"CUDA_ERROR_STREAM_CAPTURE_UNMATCHED", "the capture was not initiated in this stream"}},
    {905, {"CUDA_ERROR_STREAM_CAPTURE_ISOLATION", "dependency created on uncaptured work in another stream"}},
    {907, {"CUDA_ERROR_CAPTURED_EVENT", "operation not permitted on an event last recorded in a capturing stream"}},
    {908, {"CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD", "attempt to terminate a thread-local capture sequence from "
                                                     "another thread"}},
};

API int cuGetErrorName(int error, const char** text) {
    if (!text) return invalid_value;
    auto found = errors.find(error);
    *text = found == errors.end() ? nullptr : found->second.first;
    return *text ? success : invalid_value;
}

API int cuGetErrorString(int error, const char** text) {
    if (!text) return invalid_value;
    auto found = errors.find(error);
    *text = found == errors.end() ? nullptr : found->second.second;
    return *text ? success : invalid_value;
}
