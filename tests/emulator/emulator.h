// What the emulated libraries share: status codes, devices, streams and the way into a stream's queue.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))

namespace emulator {

/// CUresult, as far as it is used.
enum Status : int {
    success = 0,
    invalid_value = 1,
    out_of_memory = 2,
    not_initialized = 3,
    no_device = 100,
    invalid_device = 101,
    invalid_image = 200,
    invalid_context = 201,
    unsupported_limit = 215,
    peer_access_unsupported = 217,
    invalid_handle = 400,
    illegal_state = 401,
    not_found = 500,
    not_ready = 600,
    peer_access_already_enabled = 704,
    peer_access_not_enabled = 705,
    launch_failed = 719,
    not_supported = 801,
    capture_unsupported = 900,
    capture_invalidated = 901,
    capture_unmatched = 903,
    capture_isolation = 905,
    captured_event = 907,
    capture_wrong_thread = 908,
};

using Task = std::function<void()>;

/// The operations of a capture, in the order in which they were enqueued. Streams that join a capture append to the
/// same list: that order respects every dependency.
struct Graph {
    std::vector<Task> tasks;
    void* origin = nullptr;  // the stream on which the capture began
    int device = 0;
    int mode = 0;
    std::thread::id thread;
    bool active = true;
    bool invalidated = false;
};

/// A real queue: one OS thread takes the tasks in order. It owns itself until it is closed and has nothing to do.
class Stream {
public:
    static std::shared_ptr<Stream> start(int device);
    void push(Task task);
    void drain();
    bool idle();
    void close();

    const int device;
    std::shared_ptr<Graph> capture;  // guarded by state().mutex

private:
    explicit Stream(int device) : device(device) {}
    void work();
    std::mutex mutex;
    std::condition_variable changed;
    std::deque<Task> tasks;
    uint64_t pushed = 0, done = 0;
    bool closing = false;
};

/// A graph that can be launched. It takes memory of its device, as on a GPU.
struct Executable {
    std::vector<Task> tasks;
    int device;
    size_t bytes;
};

/// One cuEventRecord. Those who wait hold on to the record that was last when they began.
struct Record {
    std::mutex mutex;
    std::condition_variable changed;
    bool done = false;
    std::chrono::steady_clock::time_point time;
    void finish();
    void wait();
    bool finished();
};

struct Event {
    int device;
    bool timing;
    std::shared_ptr<Record> last;
    std::shared_ptr<Graph> graph;  // the capture in which it was last recorded
};

/// A device with its primary context and its default stream.
struct Device {
    int ordinal = 0;
    size_t total = 0, used = 0;
    int retained = 0;
    std::shared_ptr<Stream> stream;
    std::map<int, bool> peers;
    uint64_t pool_threshold = 0;
};

struct State {
    std::mutex mutex;
    bool initialized = false;
    std::vector<std::unique_ptr<Device>> devices;
    std::unordered_map<void*, std::shared_ptr<Stream>> streams;
    std::unordered_map<void*, std::shared_ptr<Event>> events;
    std::unordered_map<void*, std::shared_ptr<Graph>> graphs;
    std::unordered_map<void*, std::shared_ptr<Executable>> executables;
    std::vector<std::shared_ptr<Graph>> captures;
};

/// Lives until the process ends: queues may still run while other globals are destroyed.
State& state();

/// The device whose context is current in this thread, or null.
Device* current_device();

/// The device behind a context handle, or null.
Device* find_context(void* handle);

/// What the device's allocations take.
size_t used_memory(const Device* device);
/// Counts memory that the driver takes for itself; false if there is not enough.
bool charge_memory(Device* device, size_t bytes);
void discharge_memory(Device* device, size_t bytes);
/// Lets copies reach memory that no allocation holds: a module's variable.
void know_memory(void* memory, size_t bytes, int device);

/// The stream behind a handle (0, 1 and 2 mean the current device's default stream), or null.
std::shared_ptr<Stream> find_stream(void* handle);

/// Runs the task in the stream's order, or records it where the stream captures.
int enqueue(void* stream, Task task);
/// Enqueues and waits; refused while the stream captures.
int enqueue_and_wait(void* stream, Task task);
/// Called by all that allocates, frees, loads, makes or destroys a handle, or synchronizes more than a stream: fails beside
/// a capture, which is lost then. CUDA allows some of it, in other threads or in relaxed mode.
int refuse_in_capture();
/// The same, for waiting for a device: never allowed while a stream of it captures, whatever the mode.
int refuse_in_capture_of(int device);
/// As the above, for one stream.
int refuse_on_capturing(const std::shared_ptr<Stream>& stream);
/// Waits until every stream of the device has nothing left to do.
int drain_device(int device);

/// Whether a handle of cuBLAS is to use a stream.
bool blas_uses(void* stream);

/// The folder of this library, where kernel.h lies too.
std::string library_folder();

/// The version of CUDA that a library says it has, as 1000 * major + 10 * minor, from the environment.
int library_version(const char* name);

/// What this thread does, for the message when it crashes.
extern thread_local const char* doing;

struct Kernel;
struct Launch {
    const Kernel* kernel;
    unsigned grid[3], block[3], shared_bytes;
};
/// Executes all blocks of a launch; returns when they are done.
void run_kernel(const Launch& launch, void* const* values);

inline float bf16_to_float(uint16_t bits) { return __builtin_bit_cast(float, uint32_t(bits) << 16); }
inline uint16_t float_to_bf16(float value) {
    uint32_t bits = __builtin_bit_cast(uint32_t, value);
    if (value != value) return uint16_t(bits >> 16 | 0x40);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float half_to_float(uint16_t bits) { return float(__builtin_bit_cast(_Float16, bits)); }
inline uint16_t float_to_half(float value) { return __builtin_bit_cast(uint16_t, _Float16(value)); }

}  // namespace emulator
