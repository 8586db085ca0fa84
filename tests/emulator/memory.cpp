// The driver's memory: allocations, copies and fills.
#include "emulator.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>

#include <sys/mman.h>
#include <unistd.h>

namespace emulator {

/// A block of device memory or, with device -1, of pinned host memory.
struct Allocation {
    char* mapped;
    size_t mapped_bytes, bytes, charged;
    int device;
};

static std::mutex memory_mutex;
static auto& allocations = *new std::map<uintptr_t, Allocation>;  // by address; never destroyed, as state() is not

/// Memory between two inaccessible pages, its end (rounded up to 16 bytes) at the second one, so that an overrun
/// crashes. It reads as 0xff: NaN for every float type. The bytes come from one file that is mapped again and again,
/// privately, so that a large allocation costs no memory before it is written.
static char* map_poisoned(size_t bytes, Allocation& allocation) {
    constexpr size_t chunk = 16 << 20;
    static int poison = [] {
        int file = memfd_create("poison", MFD_CLOEXEC);
        std::string content(chunk, '\xff');
        if (file < 0 || write(file, content.data(), chunk) != ssize_t(chunk)) {
            fprintf(stderr, "emulator: no memory file for poisoned memory\n");
            abort();
        }
        return file;
    }();
    size_t page = size_t(getpagesize()), rounded = (bytes + 15) & ~size_t(15);
    size_t usable = (rounded + page - 1) / page * page;
    char* start = static_cast<char*>(
        mmap(nullptr, usable + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (start == MAP_FAILED) return nullptr;
    for (size_t at = 0; at < usable; at += chunk) {
        void* where = start + page + at;
        if (mmap(where, std::min(chunk, usable - at), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE,
                 poison, 0) != where) {
            munmap(start, usable + 2 * page);
            return nullptr;
        }
    }
    allocation.mapped = start;
    allocation.mapped_bytes = usable + 2 * page;
    return start + page + usable - rounded;
}

static int allocate(void** result, size_t bytes, Device* device) {
    if (!result || bytes == 0) return invalid_value;
    Allocation allocation{};
    allocation.bytes = bytes;
    allocation.device = device ? device->ordinal : -1;
    allocation.charged = (bytes + 511) & ~size_t(511);
    std::lock_guard lock(memory_mutex);
    if (device && (bytes > device->total || allocation.charged > device->total - device->used)) return out_of_memory;
    char* memory = map_poisoned(bytes, allocation);
    if (!memory) return out_of_memory;
    if (device) device->used += allocation.charged;
    allocations[reinterpret_cast<uintptr_t>(memory)] = allocation;
    *result = memory;
    return success;
}

static int release(void* memory, bool pinned) {
    std::lock_guard lock(memory_mutex);
    auto found = allocations.find(reinterpret_cast<uintptr_t>(memory));
    if (found == allocations.end() || (found->second.device < 0) != pinned) return invalid_value;
    Allocation allocation = found->second;
    if (!allocation.mapped) return invalid_value;  // a variable of a module
    allocations.erase(found);
    if (!pinned) state().devices[size_t(allocation.device)]->used -= allocation.charged;
    munmap(allocation.mapped, allocation.mapped_bytes);
    return success;
}

/// The device of the allocation in which the whole range lies; -1 for pinned memory, -2 for anything else.
static int owner(uintptr_t address, size_t bytes) {
    std::lock_guard lock(memory_mutex);
    auto next = allocations.upper_bound(address);
    if (next == allocations.begin()) return -2;
    auto& [start, allocation] = *std::prev(next);
    size_t offset = address - start;
    return offset <= allocation.bytes && bytes <= allocation.bytes - offset ? allocation.device : -2;
}

static bool known(uint64_t address, size_t bytes) { return owner(address, bytes) != -2; }
static bool pinned(const void* memory, size_t bytes) { return owner(reinterpret_cast<uintptr_t>(memory), bytes) == -1; }

static Task move_bytes(const char* what, uint64_t to, uint64_t from, size_t bytes) {
    return [=] {
        doing = what;
        memmove(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), bytes);
        doing = nullptr;
    };
}

static Task fill_bytes(uint64_t to, int value, size_t bytes) {
    return [=] {
        doing = "filling memory";
        memset(reinterpret_cast<void*>(to), value, bytes);
        doing = nullptr;
    };
}


size_t used_memory(const Device* device) {
    std::lock_guard lock(memory_mutex);
    return device->used;
}

bool charge_memory(Device* device, size_t bytes) {
    std::lock_guard lock(memory_mutex);
    if (bytes > device->total - device->used) return false;
    device->used += bytes;
    return true;
}

void discharge_memory(Device* device, size_t bytes) {
    std::lock_guard lock(memory_mutex);
    device->used -= bytes;
}

void know_memory(void* memory, size_t bytes, int device) {
    std::lock_guard lock(memory_mutex);
    allocations[reinterpret_cast<uintptr_t>(memory)] = {nullptr, 0, bytes, 0, device};
}

}  // namespace emulator

using namespace emulator;

// ---- allocation

API int cuMemGetInfo_v2(size_t* free_bytes, size_t* total) {
    if (!free_bytes || !total) return invalid_value;
    if (!current_device()) return invalid_context;
    *total = current_device()->total;
    *free_bytes = *total - used_memory(current_device());
    return success;
}

API int cuMemAlloc_v2(void** result, size_t bytes) {
    if (!current_device()) return invalid_context;
    if (int status = refuse_in_capture()) return status;
    return allocate(result, bytes, current_device());
}

API int cuMemFree_v2(uint64_t address) {
    int device = owner(address, 0);
    if (device < 0) return invalid_value;
    if (int status = refuse_in_capture()) return status;
    // The real call waits for the device too; with a receive pending that never comes, both hang.
    if (int status = drain_device(device)) return status;
    return release(reinterpret_cast<void*>(address), false);
}

API int cuMemAllocAsync(void** result, size_t bytes, void* handle) {
    auto stream = find_stream(handle);
    if (!stream) return invalid_value;
    {
        std::lock_guard lock(state().mutex);
        if (stream->capture) return not_supported;  // graphs with allocations of their own are not emulated
    }
    return allocate(result, bytes, state().devices[size_t(stream->device)].get());
}

API int cuMemFreeAsync(uint64_t address, void* stream) {
    if (owner(address, 0) < 0) return invalid_value;
    return enqueue(stream, [=] { release(reinterpret_cast<void*>(address), false); });
}

API int cuMemHostAlloc(void** result, size_t bytes, unsigned flags) {
    if (!current_device()) return invalid_context;
    if (flags > 7) return invalid_value;
    if (int status = refuse_in_capture()) return status;
    return allocate(result, bytes, nullptr);
}

API int cuMemFreeHost(void* memory) {
    if (int status = refuse_in_capture()) return status;
    return release(memory, true);
}

// ---- copies

API int cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, void* handle) {
    if (bytes == 0) return success;
    if (!from || !known(to, bytes)) return invalid_value;
    // Pinned memory is read when the queue gets there: a host that changes it too early gets caught.
    if (pinned(from, bytes))
        return enqueue(handle, move_bytes("copying from pinned memory", to, uint64_t(from), bytes));
    auto stream = find_stream(handle);
    if (!stream) return invalid_value;
    if (int status = refuse_on_capturing(stream)) return status;
    auto copy = std::make_shared<std::string>(static_cast<const char*>(from), bytes);
    return enqueue(handle, [=] { memcpy(reinterpret_cast<void*>(to), copy->data(), bytes); });
}

API int cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, void* stream) {
    if (bytes == 0) return success;
    if (!to || !known(from, bytes)) return invalid_value;
    Task task = move_bytes("copying to the host", uint64_t(to), from, bytes);
    // To pageable memory the real driver returns when the bytes are there.
    return pinned(to, bytes) ? enqueue(stream, task) : enqueue_and_wait(stream, task);
}

API int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void* stream) {
    if (bytes == 0) return success;
    if (!known(to, bytes) || !known(from, bytes)) return invalid_value;
    return enqueue(stream, move_bytes("copying within the device", to, from, bytes));
}

API int cuMemcpyPeerAsync(uint64_t to, void* to_context, uint64_t from, void* from_context, size_t bytes,
                          void* stream) {
    if (!find_context(to_context) || !find_context(from_context)) return invalid_context;
    return cuMemcpyDtoDAsync_v2(to, from, bytes, stream);
}

API int cuMemcpyHtoD_v2(uint64_t to, const void* from, size_t bytes) {
    if (bytes == 0) return success;
    if (!from || !known(to, bytes)) return invalid_value;
    if (int status = refuse_in_capture()) return status;
    return enqueue_and_wait(nullptr, move_bytes("copying to the device", to, uint64_t(from), bytes));
}

API int cuMemcpyDtoH_v2(void* to, uint64_t from, size_t bytes) {
    if (bytes == 0) return success;
    if (!to || !known(from, bytes)) return invalid_value;
    if (int status = refuse_in_capture()) return status;
    return enqueue_and_wait(nullptr, move_bytes("copying to the host", uint64_t(to), from, bytes));
}

API int cuMemcpyDtoD_v2(uint64_t to, uint64_t from, size_t bytes) {
    if (bytes == 0) return success;
    if (!known(to, bytes) || !known(from, bytes)) return invalid_value;
    if (int status = refuse_in_capture()) return status;
    return enqueue_and_wait(nullptr, move_bytes("copying within the device", to, from, bytes));
}

API int cuMemsetD8Async(uint64_t to, unsigned char value, size_t bytes, void* stream) {
    if (bytes == 0) return success;
    if (!known(to, bytes)) return invalid_value;
    return enqueue(stream, fill_bytes(to, value, bytes));
}

API int cuMemsetD8_v2(uint64_t to, unsigned char value, size_t bytes) {
    if (bytes == 0) return success;
    if (!known(to, bytes)) return invalid_value;
    if (int status = refuse_in_capture()) return status;
    return enqueue_and_wait(nullptr, fill_bytes(to, value, bytes));
}
