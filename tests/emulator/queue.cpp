// Streams, events, captures and graphs.
#include "emulator.h"

#include <cstdio>
#include <cstdlib>

namespace emulator {

thread_local const char* doing = nullptr;

State& state() {
    static State* instance = new State;
    return *instance;
}

std::shared_ptr<Stream> Stream::start(int device) {
    std::shared_ptr<Stream> stream(new Stream(device));
    std::thread([stream] { stream->work(); }).detach();
    return stream;
}

void Stream::work() {
    std::unique_lock lock(mutex);
    for (;;) {
        changed.wait(lock, [this] { return !tasks.empty() || closing; });
        if (tasks.empty()) return;
        Task task = std::move(tasks.front());
        tasks.pop_front();
        lock.unlock();
        task();
        task = nullptr;
        lock.lock();
        done++;
        changed.notify_all();
    }
}

void Stream::push(Task task) {
    std::lock_guard lock(mutex);
    tasks.push_back(std::move(task));
    pushed++;
    changed.notify_all();
}

void Stream::drain() {
    std::unique_lock lock(mutex);
    uint64_t target = pushed;
    changed.wait(lock, [&] { return done >= target; });
}

bool Stream::idle() {
    std::lock_guard lock(mutex);
    return done == pushed;
}

void Stream::close() {
    std::lock_guard lock(mutex);
    closing = true;
    changed.notify_all();
}

void Record::finish() {
    std::lock_guard lock(mutex);
    time = std::chrono::steady_clock::now();
    done = true;
    changed.notify_all();
}

void Record::wait() {
    std::unique_lock lock(mutex);
    changed.wait(lock, [this] { return done; });
}

bool Record::finished() {
    std::lock_guard lock(mutex);
    return done;
}

std::shared_ptr<Stream> find_stream(void* handle) {
    // 1 and 2 are CU_STREAM_LEGACY and CU_STREAM_PER_THREAD.
    if (reinterpret_cast<uintptr_t>(handle) <= 2) {
        Device* device = current_device();
        return device ? device->stream : nullptr;
    }
    std::lock_guard lock(state().mutex);
    auto found = state().streams.find(handle);
    return found == state().streams.end() ? nullptr : found->second;
}

static std::shared_ptr<Event> find_event(void* handle) {
    std::lock_guard lock(state().mutex);
    auto found = state().events.find(handle);
    return found == state().events.end() ? nullptr : found->second;
}

// Whether every device is as after a kernel that failed: whatever waits for work, or asks for more, is told so.
static std::atomic<bool> lost = false;

int enqueue(void* handle, Task task) {
    if (lost) return launch_failed;
    auto stream = find_stream(handle);
    if (!stream) return current_device() ? invalid_value : invalid_context;
    std::lock_guard lock(state().mutex);
    if (stream->capture) {
        if (stream->capture->invalidated) return capture_invalidated;
        stream->capture->tasks.push_back(std::move(task));
    } else {
        stream->push(std::move(task));
    }
    return success;
}

int enqueue_and_wait(void* handle, Task task) {
    auto stream = find_stream(handle);
    if (!stream) return current_device() ? invalid_value : invalid_context;
    if (int status = refuse_on_capturing(stream)) return status;
    stream->push(std::move(task));
    stream->drain();
    return success;
}

int refuse_on_capturing(const std::shared_ptr<Stream>& stream) {
    std::lock_guard lock(state().mutex);
    if (!stream->capture) return success;
    stream->capture->invalidated = true;
    return capture_unsupported;
}

static thread_local uint64_t changes = 0;

static int refuse_beside(const std::function<bool(const Graph&)>& forbids) {
    changes++;
    int status = success;
    std::lock_guard lock(state().mutex);
    for (auto& graph : state().captures) {
        if (!forbids(*graph)) continue;
        graph->invalidated = true;
        status = capture_unsupported;
    }
    return status;
}

int refuse_in_capture() {
    constexpr int relaxed = 2;
    return refuse_beside([](const Graph& graph) { return graph.mode != relaxed; });
}

int refuse_in_capture_of(int device) {
    if (int status = refuse_in_capture()) return status;
    changes--;
    return refuse_beside([device](const Graph& graph) { return graph.device == device; });
}

int drain_device(int device) {
    std::vector<std::shared_ptr<Stream>> streams;
    {
        std::lock_guard lock(state().mutex);
        for (auto& [handle, stream] : state().streams)
            if (stream->device == device) streams.push_back(stream);
    }
    for (auto& stream : streams) stream->drain();
    return lost ? launch_failed : success;
}

}  // namespace emulator

using namespace emulator;

/// How often this thread has asked for what no capture bears, for tests of those who should not.
API uint64_t emulatorChanges() { return changes; }
API void emulatorLose() { lost = true; }

// ---- streams

API int cuStreamCreateWithPriority(void** result, unsigned, int) {
    Device* device = current_device();
    if (!device) return invalid_context;
    if (!result) return invalid_value;
    if (int status = refuse_in_capture()) return status;
    auto stream = Stream::start(device->ordinal);
    std::lock_guard lock(state().mutex);
    state().streams[stream.get()] = stream;
    *result = stream.get();
    return success;
}

API int cuStreamCreate(void** result, unsigned flags) { return cuStreamCreateWithPriority(result, flags, 0); }

API int cuStreamDestroy_v2(void* handle) {
    if (int status = refuse_in_capture()) return status;
    if (blas_uses(handle)) {
        fprintf(stderr, "emulator: a stream is destroyed before the cuBLAS handle that uses it\n");
        abort();
    }
    std::lock_guard lock(state().mutex);
    auto found = state().streams.find(handle);
    if (found == state().streams.end()) return invalid_value;
    for (auto& device : state().devices)
        if (device->stream == found->second) return invalid_value;
    // As with the real driver, what is enqueued still runs.
    found->second->close();
    state().streams.erase(found);
    return success;
}

API int cuStreamSynchronize(void* handle) {
    auto stream = find_stream(handle);
    if (!stream) return current_device() ? invalid_value : invalid_context;
    if (int status = refuse_on_capturing(stream)) return status;
    stream->drain();
    return lost ? launch_failed : success;
}

API int cuStreamQuery(void* handle) {
    auto stream = find_stream(handle);
    if (!stream) return current_device() ? invalid_value : invalid_context;
    if (int status = refuse_on_capturing(stream)) return status;
    return stream->idle() ? success : not_ready;
}

API int cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    if (!current_device()) return invalid_context;
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return success;
}

API int cuCtxSynchronize() {
    Device* device = current_device();
    if (!device) return invalid_context;
    if (int status = refuse_in_capture_of(device->ordinal)) return status;
    return drain_device(device->ordinal);
}

API int cuLaunchHostFunc(void* stream, void (*function)(void*), void* data) {
    if (!function) return invalid_value;
    return enqueue(stream, [=] {
        doing = "a host function";
        function(data);
        doing = nullptr;
    });
}

// ---- events

API int cuEventCreate(void** result, unsigned flags) {
    constexpr unsigned disable_timing = 2;
    Device* device = current_device();
    if (!device) return invalid_context;
    if (!result) return invalid_value;
    if (int status = refuse_in_capture()) return status;
    auto event = std::make_shared<Event>();
    event->device = device->ordinal;
    event->timing = !(flags & disable_timing);
    std::lock_guard lock(state().mutex);
    state().events[event.get()] = event;
    *result = event.get();
    return success;
}

API int cuEventDestroy_v2(void* handle) {
    if (int status = refuse_in_capture()) return status;
    std::lock_guard lock(state().mutex);
    return state().events.erase(handle) ? success : invalid_value;
}

API int cuEventRecord(void* event_handle, void* stream_handle) {
    auto event = find_event(event_handle);
    if (!event) return invalid_value;
    auto stream = find_stream(stream_handle);
    if (!stream) return invalid_value;
    if (stream->device != event->device) return invalid_handle;
    std::lock_guard lock(state().mutex);
    if (stream->capture) {
        if (stream->capture->invalidated) return capture_invalidated;
        event->graph = stream->capture;
        event->last = nullptr;
        return success;
    }
    auto record = std::make_shared<Record>();
    event->last = record;
    event->graph = nullptr;
    stream->push([record] { record->finish(); });
    return success;
}

API int cuEventRecordWithFlags(void* event, void* stream, unsigned) { return cuEventRecord(event, stream); }

API int cuStreamWaitEvent(void* stream_handle, void* event_handle, unsigned) {
    auto event = find_event(event_handle);
    auto stream = find_stream(stream_handle);
    if (!event || !stream) return invalid_value;
    std::lock_guard lock(state().mutex);
    if (event->graph && event->graph->active) {
        // An event of a capture draws the waiting stream into that capture.
        if (stream->capture && stream->capture != event->graph) return capture_isolation;
        stream->capture = event->graph;
        return success;
    }
    if (stream->capture) {
        // A graph cannot wait for what happened outside of it.
        if (!event->last) return success;
        stream->capture->invalidated = true;
        return capture_isolation;
    }
    if (auto record = event->last) stream->push([record] { record->wait(); });
    return success;
}

/// The record to look at, or none for an event that was never recorded; fails for one that belongs to a capture.
static int last_record(void* handle, std::shared_ptr<Record>& record) {
    auto event = find_event(handle);
    if (!event) return invalid_value;
    std::lock_guard lock(state().mutex);
    if (event->graph && event->graph->active) return captured_event;
    record = event->last;
    return success;
}

API int cuEventQuery(void* handle) {
    std::shared_ptr<Record> record;
    if (int status = last_record(handle, record)) return status;
    if (lost) return launch_failed;
    return !record || record->finished() ? success : not_ready;
}

API int cuEventSynchronize(void* handle) {
    std::shared_ptr<Record> record;
    if (int status = last_record(handle, record)) return status;
    if (record) record->wait();
    return success;
}

API int cuEventElapsedTime_v2(float* milliseconds, void* start_handle, void* end_handle) {
    if (!milliseconds) return invalid_value;
    auto start = find_event(start_handle), end = find_event(end_handle);
    if (!start || !end) return invalid_value;
    std::shared_ptr<Record> first, second;
    if (int status = last_record(start_handle, first)) return status;
    if (int status = last_record(end_handle, second)) return status;
    if (!start->timing || !end->timing || !first || !second) return invalid_handle;
    if (!first->finished() || !second->finished()) return not_ready;
    *milliseconds = std::chrono::duration<float, std::milli>(second->time - first->time).count();
    return success;
}

API int cuEventElapsedTime(float* milliseconds, void* start, void* end) {
    return cuEventElapsedTime_v2(milliseconds, start, end);
}

// ---- captures and graphs

API int cuStreamBeginCapture_v2(void* handle, int mode) {
    auto stream = find_stream(handle);
    if (!stream || mode < 0 || mode > 2) return invalid_value;
    std::lock_guard lock(state().mutex);
    for (auto& device : state().devices)
        if (device->stream == stream) return capture_unsupported;  // the default stream cannot capture
    if (stream->capture) return illegal_state;
    auto graph = std::make_shared<Graph>();
    graph->origin = stream.get();
    graph->device = stream->device;
    graph->mode = mode;
    graph->thread = std::this_thread::get_id();
    stream->capture = graph;
    state().captures.push_back(graph);
    return success;
}

API int cuStreamEndCapture(void* handle, void** result) {
    constexpr int relaxed = 2;
    auto stream = find_stream(handle);
    if (!stream || !result) return invalid_value;
    *result = nullptr;
    std::lock_guard lock(state().mutex);
    auto graph = stream->capture;
    if (!graph) return illegal_state;
    if (graph->origin != stream.get()) return capture_unmatched;
    if (graph->mode != relaxed && graph->thread != std::this_thread::get_id()) return capture_wrong_thread;
    graph->active = false;
    for (auto& [other, member] : state().streams)
        if (member->capture == graph) member->capture = nullptr;
    std::erase(state().captures, graph);
    if (graph->invalidated) return capture_invalidated;
    state().graphs[graph.get()] = graph;
    *result = graph.get();
    return success;
}

API int cuStreamIsCapturing(void* handle, int* status) {
    auto stream = find_stream(handle);
    if (!stream || !status) return invalid_value;
    std::lock_guard lock(state().mutex);
    *status = !stream->capture ? 0 : stream->capture->invalidated ? 2 : 1;
    return success;
}

API int cuThreadExchangeStreamCaptureMode(int* mode) {
    // Captures carry their own mode; a thread has none of its own here.
    return mode ? success : invalid_value;
}

API int cuGraphInstantiateWithFlags(void** result, void* handle, unsigned long long flags) {
    constexpr unsigned long long auto_free = 1, device_launch = 4;
    if (!result) return invalid_value;
    if ((flags & auto_free) && (flags & device_launch)) return invalid_value;
    if (int status = refuse_in_capture()) return status;
    constexpr size_t node_bytes = 4096;
    std::lock_guard lock(state().mutex);
    auto found = state().graphs.find(handle);
    if (found == state().graphs.end()) return invalid_value;
    auto& graph = *found->second;
    auto executable =
        std::make_shared<Executable>(Executable{graph.tasks, graph.device, graph.tasks.size() * node_bytes});
    if (!charge_memory(state().devices[size_t(graph.device)].get(), executable->bytes)) return out_of_memory;
    state().executables[executable.get()] = executable;
    *result = executable.get();
    return success;
}

static std::shared_ptr<Executable> find_executable(void* handle) {
    std::lock_guard lock(state().mutex);
    auto found = state().executables.find(handle);
    return found == state().executables.end() ? nullptr : found->second;
}

API int cuGraphLaunch(void* handle, void* stream) {
    auto executable = find_executable(handle);
    if (!executable) return invalid_value;
    return enqueue(stream, [executable] {
        for (auto& task : executable->tasks) task();
    });
}

API int cuGraphUpload(void* handle, void* stream) {
    return find_executable(handle) && find_stream(stream) ? success : invalid_value;
}

API int cuGraphDestroy(void* handle) {
    if (int status = refuse_in_capture()) return status;
    std::lock_guard lock(state().mutex);
    return state().graphs.erase(handle) ? success : invalid_value;
}

API int cuGraphExecDestroy(void* handle) {
    if (int status = refuse_in_capture()) return status;
    std::lock_guard lock(state().mutex);
    auto found = state().executables.find(handle);
    if (found == state().executables.end()) return invalid_value;
    discharge_memory(state().devices[size_t(found->second->device)].get(), found->second->bytes);
    state().executables.erase(found);
    return success;
}
