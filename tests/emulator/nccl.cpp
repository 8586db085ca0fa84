// NCCL for two ranks: sends and receives over a socket between them, each executed by the queue of its stream.
//
// Whoever creates the unique id listens for both ranks at a socket that the id names. When both have come and fit
// together, it hands each one end of a socket pair and is done.
#include "emulator.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <utility>

#include <errno.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

namespace {

enum Result : int {
    success = 0,
    unhandled_cuda_error = 1,
    system_error = 2,
    internal_error = 3,
    invalid_argument = 4,
    invalid_usage = 5,
    remote_error = 6,
    in_progress = 7,
};

struct UniqueId {
    char internal[128];
};

/// The beginning of ncclConfig_t, which is all that matters here. Unset fields are INT_MIN.
struct Config {
    size_t size;
    unsigned magic, version;
    int blocking;
};

/// What a rank says of itself when it comes.
struct Hello {
    int rank, ranks, device;
    char host[244];
};

/// Precedes each message. A length that no message has says goodbye: the rank ended its communicator in order.
struct Header {
    uint64_t bytes;
};
constexpr uint64_t goodbye = ~uint64_t(0);

struct Communicator {
    int rank = 0, ranks = 0, device = 0;
    bool blocking = true;

    std::mutex mutex;
    std::condition_variable changed;
    int socket = -1;        // to the other rank
    int bootstrap = -1;     // while connecting
    int state = in_progress;
    bool connected = false, aborted = false;
    int pending = 0;        // operations enqueued and not finished
    bool flushing = false;  // ncclCommFinalize was called

    std::mutex sending, receiving;  // one message at a time in each direction

    ~Communicator() {
        if (socket >= 0) close(socket);
    }

    void set_state(int value) {
        std::lock_guard lock(mutex);
        if (state == success || state == in_progress) state = value;
        changed.notify_all();
    }

    bool is_aborted() {
        std::lock_guard lock(mutex);
        return aborted;
    }

    /// Keeps the calling queue, like a kernel that waits for its peer, until the communicator is aborted.
    void block() {
        std::unique_lock lock(mutex);
        changed.wait(lock, [this] { return aborted; });
    }

    /// The other rank is gone. The real library may notice or wait forever; the environment says which to be.
    void lost_peer() {
        if (is_aborted()) return;
        const char* choice = getenv("EMULATOR_NCCL_DEATH");
        if (choice && !strcmp(choice, "report")) set_state(remote_error);
        block();
    }
};

struct Operation {
    bool send;
    char* data;
    size_t bytes;
    std::shared_ptr<Communicator> communicator;
    void* stream;
};

std::mutex registry_mutex;
auto& registry = *new std::unordered_map<void*, std::shared_ptr<Communicator>>;
thread_local std::string last_error;
thread_local int group_depth = 0;
thread_local std::vector<Operation> group;

std::shared_ptr<Communicator> find(void* handle) {
    std::lock_guard lock(registry_mutex);
    auto found = registry.find(handle);
    return found == registry.end() ? nullptr : found->second;
}

int fail(int result, const char* why) {
    last_error = why;
    return result;
}

// ---- sockets

bool write_all(int socket, const void* data, size_t bytes) {
    const char* at = static_cast<const char*>(data);
    while (bytes > 0) {
        ssize_t n = send(socket, at, bytes, MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return false;
        at += n;
        bytes -= size_t(n);
    }
    return true;
}

bool read_all(int socket, void* data, size_t bytes) {
    char* at = static_cast<char*>(data);
    while (bytes > 0) {
        ssize_t n = recv(socket, at, bytes, 0);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return false;
        at += n;
        bytes -= size_t(n);
    }
    return true;
}

/// An address in Linux's abstract namespace: no file remains when a process is killed.
socklen_t address_of(const UniqueId& id, sockaddr_un& address) {
    address = {};
    address.sun_family = AF_UNIX;
    size_t length = std::min(strnlen(id.internal, sizeof id.internal), sizeof address.sun_path - 2);
    memcpy(address.sun_path + 1, id.internal, length);
    return socklen_t(offsetof(sockaddr_un, sun_path) + 1 + length);
}

/// Sends a result and, if there is one, a file descriptor.
void send_answer(int socket, int result, int descriptor) {
    iovec part{&result, sizeof result};
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
    msghdr message = {};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    if (descriptor >= 0) {
        message.msg_control = control;
        message.msg_controllen = sizeof control;
        cmsghdr* header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(header), &descriptor, sizeof(int));
    }
    sendmsg(socket, &message, MSG_NOSIGNAL);
}

int receive_answer(int socket, int& descriptor) {
    int result = remote_error;
    iovec part{&result, sizeof result};
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
    msghdr message = {};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    ssize_t n;
    while ((n = recvmsg(socket, &message, MSG_CMSG_CLOEXEC)) < 0 && errno == EINTR) {}
    if (n != ssize_t(sizeof result)) return remote_error;
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    if (header && header->cmsg_type == SCM_RIGHTS) memcpy(&descriptor, CMSG_DATA(header), sizeof(int));
    return result;
}

// ---- bringing the ranks together

int judge(const Hello& a, const Hello& b) {
    if (a.ranks != b.ranks || a.rank == b.rank) return invalid_usage;
    // "Duplicate GPU detected": the real library refuses two ranks on one device of one host.
    return a.device == b.device && !strcmp(a.host, b.host) ? invalid_usage : success;
}

/// The listening side; runs once, in a thread of the process that created the id.
void introduce(int listener) {
    int sockets[2];
    Hello hellos[2];
    for (int i = 0; i < 2;) {
        sockets[i] = accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
        if (sockets[i] < 0) {
            if (errno == EINTR || errno == ECONNABORTED) continue;
            close(listener);
            return;
        }
        if (read_all(sockets[i], &hellos[i], sizeof(Hello)))
            i++;
        else
            close(sockets[i]);
    }
    close(listener);
    int pair[2] = {-1, -1};
    int result = judge(hellos[0], hellos[1]);
    if (result == success && socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) != 0) result = system_error;
    for (int i = 0; i < 2; i++) {
        send_answer(sockets[i], result, pair[i]);
        close(sockets[i]);
        if (pair[i] >= 0) close(pair[i]);
    }
}

/// The hash of NCCL_HOSTID or of the host's name tells the real library which ranks share a machine.
std::string host_name() {
    const char* chosen = getenv("NCCL_HOSTID");
    char name[128] = "";
    gethostname(name, sizeof name - 1);
    return chosen && *chosen ? chosen : name;
}

void connect_rank(const std::shared_ptr<Communicator>& communicator, const UniqueId& id) {
    int result = success, descriptor = -1;
    if (communicator->ranks > 1) {
        Hello hello{communicator->rank, communicator->ranks, communicator->device, ""};
        snprintf(hello.host, sizeof hello.host, "%s", host_name().c_str());
        sockaddr_un address;
        socklen_t length = address_of(id, address);
        int bootstrap = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        {
            std::lock_guard lock(communicator->mutex);
            communicator->bootstrap = bootstrap;
        }
        if (bootstrap < 0 || connect(bootstrap, reinterpret_cast<sockaddr*>(&address), length) != 0)
            result = system_error;
        else if (!write_all(bootstrap, &hello, sizeof hello))
            result = remote_error;
        else
            result = receive_answer(bootstrap, descriptor);
        std::lock_guard lock(communicator->mutex);
        communicator->bootstrap = -1;
        if (bootstrap >= 0) close(bootstrap);
    }
    std::lock_guard lock(communicator->mutex);
    communicator->socket = descriptor;
    communicator->connected = result == success;
    if (communicator->aborted && descriptor >= 0) shutdown(descriptor, SHUT_RDWR);
    communicator->state = result;
    communicator->changed.notify_all();
}

// ---- messages

void transfer(const Operation& operation) {
    Communicator& communicator = *operation.communicator;
    if (communicator.is_aborted()) return;
    std::lock_guard turn(operation.send ? communicator.sending : communicator.receiving);
    if (operation.send) {
        Header header{operation.bytes};
        if (!write_all(communicator.socket, &header, sizeof header) ||
            !write_all(communicator.socket, operation.data, operation.bytes))
            communicator.lost_peer();
        return;
    }
    Header header;
    if (!read_all(communicator.socket, &header, sizeof header) || header.bytes == goodbye) {
        communicator.lost_peer();
    } else if (header.bytes != operation.bytes) {
        communicator.set_state(invalid_argument);
        communicator.block();
    } else if (!read_all(communicator.socket, operation.data, operation.bytes)) {
        communicator.lost_peer();
    }
}

/// Operations of one group on one stream: sends and receives go on at the same time, so that two ranks that each send
/// and receive do not wait for each other.
void transfer_all(const std::vector<Operation>& operations) {
    emulator::doing = "a transfer between ranks";
    bool sends = false, receives = false;
    for (auto& operation : operations) (operation.send ? sends : receives) = true;
    auto one_way = [&](bool send) {
        for (auto& operation : operations)
            if (operation.send == send) transfer(operation);
    };
    if (sends && receives) {
        std::thread other([&] { one_way(true); });
        one_way(false);
        other.join();
    } else {
        one_way(sends);
    }
    emulator::doing = nullptr;
}

int submit(std::vector<Operation> operations) {
    while (!operations.empty()) {
        // What goes to one stream becomes one task of it.
        std::vector<Operation> together, rest;
        for (auto& operation : operations)
            (operation.stream == operations[0].stream ? together : rest).push_back(operation);
        for (auto& operation : together) {
            std::lock_guard lock(operation.communicator->mutex);
            operation.communicator->pending++;
        }
        int status = emulator::enqueue(together[0].stream, [together] {
            transfer_all(together);
            for (auto& operation : together) {
                std::lock_guard lock(operation.communicator->mutex);
                operation.communicator->pending--;
                operation.communicator->changed.notify_all();
            }
        });
        if (status != 0) {
            for (auto& operation : together) {
                std::lock_guard lock(operation.communicator->mutex);
                operation.communicator->pending--;
            }
            return fail(unhandled_cuda_error, "the stream takes no operation");
        }
        operations = std::move(rest);
    }
    return success;
}

int point_to_point(bool send, const void* data, size_t count, int type, int peer, void* handle, void* stream) {
    static const size_t sizes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};
    auto communicator = find(handle);
    if (!communicator) return fail(invalid_argument, "not a communicator");
    if (type < 0 || type >= int(std::size(sizes))) return fail(invalid_argument, "not a data type");
    if (peer < 0 || peer >= communicator->ranks || peer == communicator->rank)
        return fail(invalid_argument, "not the other rank");
    if (count && !data) return fail(invalid_argument, "no buffer");
    {
        std::lock_guard lock(communicator->mutex);
        // The real library refuses a communicator that does not yet stand, and repeats an earlier error.
        if (communicator->state == in_progress)
            return fail(invalid_argument, "communicator used before the previous operation returned ncclSuccess");
        if (communicator->state != success) return fail(communicator->state, "the communicator has failed");
        if (communicator->flushing) return fail(invalid_argument, "the communicator is finalized");
    }
    auto queue = emulator::find_stream(stream);
    if (!queue || queue->device != communicator->device)
        return fail(invalid_argument, "the stream is not of the communicator's device");
    Operation operation{send, const_cast<char*>(static_cast<const char*>(data)), count * sizes[type], communicator,
                        stream};
    if (group_depth == 0) return submit({operation});
    group.push_back(operation);
    return success;
}

}  // namespace

API int ncclGetVersion(int* version) {
    if (!version) return invalid_argument;
    *version = 22703;
    return success;
}

API int ncclGetUniqueId(UniqueId* id) {
    if (!id) return invalid_argument;
    memset(id, 0, sizeof *id);
    std::random_device random;
    snprintf(id->internal, sizeof id->internal, "emulated-nccl-%08x%08x%08x%08x", random(), random(), random(),
             random());
    sockaddr_un address;
    socklen_t length = address_of(*id, address);
    int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (listener < 0 || bind(listener, reinterpret_cast<sockaddr*>(&address), length) != 0 || listen(listener, 4) != 0)
        return fail(system_error, strerror(errno));
    std::thread(introduce, listener).detach();
    return success;
}

API int ncclCommInitRankConfig(void** result, int ranks, UniqueId id, int rank, const Config* config) {
    if (!result) return invalid_argument;
    *result = nullptr;
    emulator::Device* device = emulator::current_device();
    if (!device) return fail(unhandled_cuda_error, "no current context");
    if (emulator::refuse_in_capture()) return fail(unhandled_cuda_error, "a stream is captured");
    if (rank < 0 || rank >= ranks || ranks > 2) return fail(invalid_argument, "one or two ranks are emulated");
    auto communicator = std::make_shared<Communicator>();
    communicator->rank = rank;
    communicator->ranks = ranks;
    communicator->device = device->ordinal;
    communicator->blocking = !config || config->blocking != 0;
    if (communicator->blocking) {
        connect_rank(communicator, id);
        if (communicator->state != success) return fail(communicator->state, "the ranks did not come together");
    }
    {
        std::lock_guard lock(registry_mutex);
        registry[communicator.get()] = communicator;
    }
    *result = communicator.get();
    if (communicator->blocking) return success;
    std::thread([communicator, id] { connect_rank(communicator, id); }).detach();
    return in_progress;
}

API int ncclCommInitRank(void** result, int ranks, UniqueId id, int rank) {
    return ncclCommInitRankConfig(result, ranks, id, rank, nullptr);
}

API int ncclSend(const void* data, size_t count, int type, int peer, void* communicator, void* stream) {
    return point_to_point(true, data, count, type, peer, communicator, stream);
}

API int ncclRecv(void* data, size_t count, int type, int peer, void* communicator, void* stream) {
    return point_to_point(false, data, count, type, peer, communicator, stream);
}

API int ncclGroupStart() {
    group_depth++;
    return success;
}

API int ncclGroupEnd() {
    if (group_depth == 0) return fail(invalid_usage, "no group was started");
    if (--group_depth > 0) return success;
    return submit(std::exchange(group, {}));
}

API int ncclCommGetAsyncError(void* handle, int* error) {
    auto communicator = find(handle);
    if (!communicator || !error) return invalid_argument;
    std::lock_guard lock(communicator->mutex);
    *error = communicator->state == success && communicator->flushing && communicator->pending > 0
                 ? int(in_progress)
                 : communicator->state;
    return success;
}

API int ncclCommAbort(void* handle) {
    auto communicator = find(handle);
    if (!communicator) return invalid_argument;
    if (emulator::refuse_in_capture()) return fail(unhandled_cuda_error, "a stream is captured");
    {
        std::lock_guard lock(communicator->mutex);
        communicator->aborted = true;
        for (int socket : {communicator->socket, communicator->bootstrap})
            if (socket >= 0) shutdown(socket, SHUT_RDWR);
        communicator->changed.notify_all();
    }
    // Operations that are still queued keep the communicator alive and return at once when their turn comes.
    std::lock_guard lock(registry_mutex);
    registry.erase(handle);
    return success;
}

API int ncclCommFinalize(void* handle) {
    auto communicator = find(handle);
    if (!communicator) return invalid_argument;
    std::unique_lock lock(communicator->mutex);
    if (communicator->state == in_progress) return fail(invalid_argument, "the communicator does not stand yet");
    if (communicator->state != success) return communicator->state;
    communicator->flushing = true;
    if (communicator->pending == 0) return success;
    if (!communicator->blocking) return in_progress;
    communicator->changed.wait(lock, [&] { return communicator->pending == 0 || communicator->aborted; });
    return success;
}

API int ncclCommDestroy(void* handle) {
    auto communicator = find(handle);
    if (!communicator) return invalid_argument;
    std::unique_lock lock(communicator->mutex);
    auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(30);
    communicator->changed.wait_until(lock, deadline, [&] { return communicator->pending == 0; });
    if (communicator->socket >= 0) {
        // The real call may hang when the other rank died without ending its communicator, as nobody answers it any
        // more. Here it does for 30 seconds: long enough to be noticed, short enough for a test to end.
        Header header{0};
        pollfd closed{communicator->socket, POLLRDHUP, 0};
        ssize_t n = recv(communicator->socket, &header, sizeof header, MSG_PEEK | MSG_DONTWAIT);
        bool orderly = n == ssize_t(sizeof header) && header.bytes == goodbye;
        if (!orderly && poll(&closed, 1, 0) > 0)
            communicator->changed.wait_until(lock, deadline, [&] { return communicator->aborted; });
        header.bytes = goodbye;
        send(communicator->socket, &header, sizeof header, MSG_NOSIGNAL | MSG_DONTWAIT);
        shutdown(communicator->socket, SHUT_WR);
    }
    communicator->aborted = true;
    communicator->changed.notify_all();
    lock.unlock();
    std::lock_guard registry_lock(registry_mutex);
    registry.erase(handle);
    return success;
}

API int ncclCommCount(void* handle, int* count) {
    auto communicator = find(handle);
    if (!communicator || !count) return invalid_argument;
    *count = communicator->ranks;
    return success;
}

API int ncclCommUserRank(void* handle, int* rank) {
    auto communicator = find(handle);
    if (!communicator || !rank) return invalid_argument;
    *rank = communicator->rank;
    return success;
}

API int ncclCommCuDevice(void* handle, int* device) {
    auto communicator = find(handle);
    if (!communicator || !device) return invalid_argument;
    *device = communicator->device;
    return success;
}

API const char* ncclGetErrorString(int result) {
    switch (result) {
        case success: return "no error";
        case unhandled_cuda_error: return "unhandled cuda error (run with NCCL_DEBUG=INFO for details)";
        case system_error: return "unhandled system error (run with NCCL_DEBUG=INFO for details)";
        case internal_error: return "internal error";
        case invalid_argument: return "invalid argument (run with NCCL_DEBUG=WARN for details)";
        case invalid_usage: return "invalid usage (run with NCCL_DEBUG=WARN for details)";
        case remote_error: return "remote process exited or there was a network error";
        case in_progress: return "NCCL operation in progress";
        default: return "unknown result code";
    }
}

API const char* ncclGetLastError(void*) { return last_error.c_str(); }
