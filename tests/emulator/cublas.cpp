// cuBLAS: matrix products in column-major order, enqueued on the handle's stream and summed in float.
#include "emulator.h"

#include <algorithm>
#include <cstring>

namespace {

enum Result { success = 0, not_initialized = 1, invalid_value = 7, execution_failed = 13, not_supported = 15 };
enum Type { f32 = 0, f16 = 2, bf16 = 14 };

struct Handle {
    emulator::Device* device;
    void* stream = nullptr;
    int math_mode = 0;
    bool device_scalars = false;
};

std::mutex mutex;
auto& handles = *new std::unordered_map<void*, std::shared_ptr<Handle>>;

std::shared_ptr<Handle> find(void* handle) {
    std::lock_guard lock(mutex);
    auto found = handles.find(handle);
    return found == handles.end() ? nullptr : found->second;
}

/// A matrix in memory: element (row, column) of what it stands for, after its transposition.
struct Matrix {
    const char* data;
    int type;
    int64_t row_step, column_step;
};

size_t size_of(int type) { return type == f32 ? 4 : 2; }

float load(const Matrix& matrix, int64_t row, int64_t column) {
    const char* at = matrix.data + size_t(row * matrix.row_step + column * matrix.column_step) * size_of(matrix.type);
    if (matrix.type == f32) {
        float value;
        memcpy(&value, at, 4);
        return value;
    }
    uint16_t bits;
    memcpy(&bits, at, 2);
    return matrix.type == bf16 ? emulator::bf16_to_float(bits) : emulator::half_to_float(bits);
}

void store(char* data, int type, int64_t index, float value) {
    if (type == f32) {
        memcpy(data + 4 * index, &value, 4);
    } else {
        uint16_t bits = type == bf16 ? emulator::float_to_bf16(value) : emulator::float_to_half(value);
        memcpy(data + 2 * index, &bits, 2);
    }
}

constexpr int block = 128;

/// sum[j][i] = the products of a panel of up to `block` rows (k columns, one after the other) with four columns.
__attribute__((target_clones("default", "arch=x86-64-v3"))) void multiply(const float* panel, const float* columns,
                                                                          int k, float (*sum)[block]) {
    memset(sum, 0, sizeof(float) * 4 * block);
    for (int p = 0; p < k; p++) {
        const float* a = panel + size_t(p) * block;
        const float* b = columns + size_t(p) * 4;
        for (int i = 0; i < block; i++) {
            sum[0][i] += a[i] * b[0];
            sum[1][i] += a[i] * b[1];
            sum[2][i] += a[i] * b[2];
            sum[3][i] += a[i] * b[3];
        }
    }
}

void product(int m, int n, int k, float alpha, const Matrix& a, const Matrix& b, float beta, char* c, int c_type,
             int64_t ldc) {
    // Both inputs as float panels: `block` rows of A at a time, B in groups of four columns. Padding is zero.
    int groups = (n + 3) / 4;
    std::vector<float> columns(size_t(groups) * 4 * size_t(k)), panel(size_t(block) * size_t(k));
    for (int j = 0; j < n; j++)
        for (int p = 0; p < k; p++)
            columns[size_t(j / 4) * 4 * size_t(k) + size_t(p) * 4 + size_t(j % 4)] = load(b, p, j);
    alignas(32) float sum[4][block];
    for (int row = 0; row < m; row += block) {
        int rows = std::min(block, m - row);
        if (rows < block) std::fill(panel.begin(), panel.end(), 0.0f);
        // In the order in which A lies in memory.
        if (a.row_step == 1) {
            for (int p = 0; p < k; p++)
                for (int i = 0; i < rows; i++) panel[size_t(p) * block + size_t(i)] = load(a, row + i, p);
        } else {
            for (int i = 0; i < rows; i++)
                for (int p = 0; p < k; p++) panel[size_t(p) * block + size_t(i)] = load(a, row + i, p);
        }
        for (int group = 0; group < groups; group++) {
            multiply(panel.data(), columns.data() + size_t(group) * 4 * size_t(k), k, sum);
            for (int j = 0; j < std::min(4, n - group * 4); j++) {
                int64_t column = int64_t(group * 4 + j) * ldc;
                for (int i = 0; i < rows; i++) {
                    float value = alpha * sum[j][i];
                    // With beta 0, C may hold anything and is not read.
                    if (beta != 0) value += beta * load({c, c_type, 1, 0}, column + row + i, 0);
                    store(c, c_type, column + row + i, value);
                }
            }
        }
    }
}

bool known(int type) { return type == f32 || type == f16 || type == bf16; }

}  // namespace

bool emulator::blas_uses(void* stream) {
    std::lock_guard lock(mutex);
    for (auto& [_, handle] : handles)
        if (handle->stream == stream) return true;
    return false;
}

API int cublasCreate_v2(void** result) {
    emulator::Device* device = emulator::current_device();
    if (!result) return invalid_value;
    if (!device) return not_initialized;
    if (emulator::refuse_in_capture()) return execution_failed;
    auto handle = std::make_shared<Handle>();
    handle->device = device;
    std::lock_guard lock(mutex);
    handles[handle.get()] = handle;
    *result = handle.get();
    return success;
}

API int cublasDestroy_v2(void* handle) {
    auto found = find(handle);
    if (!found) return not_initialized;
    // As documented, this waits for the device.
    if (emulator::refuse_in_capture_of(found->device->ordinal)) return execution_failed;
    emulator::drain_device(found->device->ordinal);
    std::lock_guard lock(mutex);
    handles.erase(handle);
    return success;
}

API int cublasSetStream_v2(void* handle, void* stream) {
    auto found = find(handle);
    if (!found) return not_initialized;
    if (reinterpret_cast<uintptr_t>(stream) > 2 && !emulator::find_stream(stream)) return invalid_value;
    found->stream = stream;
    return success;
}

API int cublasGetStream_v2(void* handle, void** stream) {
    auto found = find(handle);
    if (!found) return not_initialized;
    if (!stream) return invalid_value;
    *stream = found->stream;
    return success;
}

API int cublasSetWorkspace_v2(void* handle, void* workspace, size_t bytes) {
    if (!find(handle)) return not_initialized;
    return (workspace || bytes == 0) && reinterpret_cast<uintptr_t>(workspace) % 16 == 0 ? success : invalid_value;
}

API int cublasSetMathMode(void* handle, int mode) {
    auto found = find(handle);
    if (!found) return not_initialized;
    found->math_mode = mode;
    return success;
}

API int cublasGetMathMode(void* handle, int* mode) {
    auto found = find(handle);
    if (!found) return not_initialized;
    if (!mode) return invalid_value;
    *mode = found->math_mode;
    return success;
}

API int cublasSetPointerMode_v2(void* handle, int mode) {
    auto found = find(handle);
    if (!found) return not_initialized;
    found->device_scalars = mode == 1;
    return success;
}

API int cublasGetPointerMode_v2(void* handle, int* mode) {
    auto found = find(handle);
    if (!found) return not_initialized;
    if (!mode) return invalid_value;
    *mode = found->device_scalars;
    return success;
}

API int cublasSetAtomicsMode(void* handle, int) { return find(handle) ? success : not_initialized; }

API int cublasGetVersion_v2(void* handle, int* version) {
    if (!find(handle)) return not_initialized;
    if (!version) return invalid_value;
    *version = 130000;
    return success;
}

API int cublasGetProperty(int which, int* value) {
    if (!value || which < 0 || which > 2) return invalid_value;
    *value = which == 0 ? 13 : 0;  // major, minor, patch
    return success;
}

API const char* cublasGetStatusName(int status) {
    switch (status) {
        case success: return "CUBLAS_STATUS_SUCCESS";
        case not_initialized: return "CUBLAS_STATUS_NOT_INITIALIZED";
        case invalid_value: return "CUBLAS_STATUS_INVALID_VALUE";
        case execution_failed: return "CUBLAS_STATUS_EXECUTION_FAILED";
        case not_supported: return "CUBLAS_STATUS_NOT_SUPPORTED";
        default: return "unknown";
    }
}

API const char* cublasGetStatusString(int status) { return cublasGetStatusName(status); }

API int cublasGemmStridedBatchedEx(void* handle, int transa, int transb, int m, int n, int k, const void* alpha,
                                   const void* a, int a_type, int lda, long long stride_a, const void* b, int b_type,
                                   int ldb, long long stride_b, const void* beta, void* c, int c_type, int ldc,
                                   long long stride_c, int batches, int compute, int) {
    auto found = find(handle);
    if (!found) return not_initialized;
    if (m < 0 || n < 0 || k < 0 || batches < 0 || transa < 0 || transa > 2 || transb < 0 || transb > 2)
        return invalid_value;
    if (lda < std::max(1, transa ? k : m) || ldb < std::max(1, transb ? n : k) || ldc < std::max(1, m))
        return invalid_value;
    // CUBLAS_COMPUTE_32F, also pedantic or with faster formats inside.
    bool float_sums = compute == 68 || compute == 69 || compute == 74 || compute == 75 || compute == 77;
    if (!float_sums || !known(a_type) || a_type != b_type || (c_type != a_type && c_type != f32)) return not_supported;
    if (m == 0 || n == 0 || batches == 0) return success;
    if (!alpha || !beta || !c || (k > 0 && (!a || !b))) return invalid_value;
    auto stream = emulator::find_stream(found->stream);
    if (!stream || stream->device != found->device->ordinal) return invalid_value;

    float host_alpha = 0, host_beta = 0;
    bool on_device = found->device_scalars;
    if (!on_device) {
        memcpy(&host_alpha, alpha, 4);
        memcpy(&host_beta, beta, 4);
    }
    int status = emulator::enqueue(found->stream, [=] {
        emulator::doing = "a matrix product";
        float scale = on_device ? *static_cast<const float*>(alpha) : host_alpha;
        float keep = on_device ? *static_cast<const float*>(beta) : host_beta;
        for (long long i = 0; i < batches; i++) {
            Matrix left{static_cast<const char*>(a) + i * stride_a * (long long)size_of(a_type), a_type,
                        transa ? lda : 1, transa ? 1 : lda};
            Matrix right{static_cast<const char*>(b) + i * stride_b * (long long)size_of(b_type), b_type,
                         transb ? ldb : 1, transb ? 1 : ldb};
            char* out = static_cast<char*>(c) + i * stride_c * (long long)size_of(c_type);
            product(m, n, k, scale, left, right, keep, out, c_type, ldc);
        }
        emulator::doing = nullptr;
    });
    return status == 0 ? success : execution_failed;
}

API int cublasGemmEx(void* handle, int transa, int transb, int m, int n, int k, const void* alpha, const void* a,
                     int a_type, int lda, const void* b, int b_type, int ldb, const void* beta, void* c, int c_type,
                     int ldc, int compute, int algorithm) {
    return cublasGemmStridedBatchedEx(handle, transa, transb, m, n, k, alpha, a, a_type, lda, 0, b, b_type, ldb, 0,
                                      beta, c, c_type, ldc, 0, 1, compute, algorithm);
}

API int cublasSgemm_v2(void* handle, int transa, int transb, int m, int n, int k, const float* alpha, const float* a,
                       int lda, const float* b, int ldb, const float* beta, float* c, int ldc) {
    return cublasGemmEx(handle, transa, transb, m, n, k, alpha, a, f32, lda, b, f32, ldb, beta, c, f32, ldc, 68, -1);
}
