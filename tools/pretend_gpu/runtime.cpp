// The runtime of a GPU that is not there: the calls of CUDA's runtime and of cuBLAS that PyTorch makes, answered by LD_PRELOAD.
//
// Kernels and products do nothing. Memory of the device is address space, which costs nothing until it is touched and reads
// as zeros. Copies up to a size are made, so that tiny models keep their weights; those of batches are not. Every launch, copy
// and wait is counted; site/pretend_meter.py reads the counters. What is not answered here reaches CUDA's own runtime, which then
// finds no driver.
//
//   PRETEND_GPUS        how many GPUs there are (1)
//   PRETEND_BYTES       memory of each (141 GB)
//   PRETEND_COPY_BYTES  larger copies are counted, but not made (8 MB)

// cuBLAS names these types only as pointers; their headers need others that no wheel holds.
#define __CUDA_FP16_H__
#define __CUDA_BF16_H__
#define __CUDA_FP8_H__
struct __half;
struct __half2;
struct __nv_bfloat16;

#include <cublasLt.h>
#include <cublas_v2.h>
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <sys/mman.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace {

// --- what is counted ------------------------------------------------------------------------------------------------------

enum Counter {
    LAUNCHES,       // kernels and products
    PRODUCTS,       // products of matrices
    UP,             // copies host -> device
    UP_BYTES,
    UP_PAGEABLE,    // of these from memory that is not pinned: a real copy of more than 64 kB would block the host
    UP_PAGEABLE_BYTES,
    UP_PAGEABLE_LARGEST,
    DOWN,           // copies device -> host
    DOWN_BYTES,
    DOWN_PAGEABLE,  // of these into memory that is not pinned: each blocks the host
    ACROSS,         // copies device -> device
    WAIT_EVENT,     // the host waits: for an event,
    WAIT_STREAM,    // for all that a stream was given,
    WAIT_DEVICE,    // for all that the device was given, also by a copy without a stream
    WAIT_FREE,      // or to give memory back
    ALLOCATIONS,    // of the device's memory; PyTorch keeps what it has, so that a steady step makes none
    NUM_COUNTERS
};
const char* const NAMES =
    "launches products up up_bytes up_pageable up_pageable_bytes up_pageable_largest down down_bytes down_pageable across "
    "wait_event wait_stream wait_device wait_free allocations";

std::atomic<long long> counters[NUM_COUNTERS];

// Gloo stands in for NCCL, which copies nothing through the host and waits for nothing: its threads do not count.
bool is_counted() {
    static thread_local int known = -1;
    if (known < 0) {
        char name[16] = "";
        pthread_getname_np(pthread_self(), name, sizeof name);
        known = strncmp(name, "pt_gloo", 7) != 0;
    }
    return known;
}

void count(Counter which, long long number = 1) {
    if (is_counted()) counters[which] += number;
}

void count_largest(Counter which, long long number) {
    long long before = counters[which];
    while (is_counted() && number > before && !counters[which].compare_exchange_weak(before, number)) {}
}

// --- memory ---------------------------------------------------------------------------------------------------------------

const int MOST_GPUS = 16;

long long setting(const char* name, long long otherwise) {
    // Asked for each time: a forked process has settings of its own.
    const char* given = getenv(name);
    return given && *given ? atoll(given) : otherwise;
}

int num_gpus() { return (int)setting("PRETEND_GPUS", 1); }
size_t total_bytes() { return (size_t)setting("PRETEND_BYTES", 141000000000LL); }

struct Block {
    size_t bytes;
    int gpu;
};

std::mutex lock;
std::map<const char*, Block> device_blocks, pinned_blocks;  // by address
size_t used_bytes[MOST_GPUS];
thread_local int current_gpu = 0;
thread_local cudaError_t last_error = cudaSuccess;

cudaError_t failed(cudaError_t error) { return last_error = error; }

// The block that an address lies in, or nullptr. The caller holds the lock.
const Block* block_of(const std::map<const char*, Block>& blocks, const void* address) {
    auto after = blocks.upper_bound((const char*)address);
    if (after == blocks.begin()) return nullptr;
    const auto& [start, block] = *--after;
    return (const char*)address < start + block.bytes ? &block : nullptr;
}

cudaError_t take_memory(void** address, size_t bytes) {
    std::lock_guard<std::mutex> held(lock);
    if (used_bytes[current_gpu] + bytes > total_bytes()) return failed(cudaErrorMemoryAllocation);
    void* room = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (room == MAP_FAILED) return failed(cudaErrorMemoryAllocation);
    device_blocks[(const char*)room] = {bytes, current_gpu};
    used_bytes[current_gpu] += bytes;
    count(ALLOCATIONS);
    *address = room;
    return cudaSuccess;
}

cudaError_t give_memory_back(void* address) {
    std::lock_guard<std::mutex> held(lock);
    auto found = device_blocks.find((const char*)address);
    if (found != device_blocks.end()) {
        munmap(address, found->second.bytes);
        used_bytes[found->second.gpu] -= found->second.bytes;
        device_blocks.erase(found);
    }
    return cudaSuccess;
}

cudaError_t copy(void* target, const void* source, size_t bytes) {
    bool to_device, from_device, is_pinned;
    {
        std::lock_guard<std::mutex> held(lock);
        to_device = block_of(device_blocks, target);
        from_device = block_of(device_blocks, source);
        is_pinned = block_of(pinned_blocks, to_device ? source : target);
    }
    if (to_device && from_device) {
        count(ACROSS);
    } else if (to_device) {
        count(UP);
        count(UP_BYTES, bytes);
        if (!is_pinned) {
            count(UP_PAGEABLE);
            count(UP_PAGEABLE_BYTES, bytes);
            count_largest(UP_PAGEABLE_LARGEST, bytes);
        }
    } else if (from_device) {
        count(DOWN);
        count(DOWN_BYTES, bytes);
        if (!is_pinned) count(DOWN_PAGEABLE);
    }
    // A batch comes from pinned memory. Nothing computes with it, and its bytes, read later as numbers of another type, could
    // be NaN. What gloo exchanged is written.
    bool is_batch = to_device && !from_device && is_pinned && is_counted();
    if (bytes <= (size_t)setting("PRETEND_COPY_BYTES", 8 << 20) && !is_batch) {
        memmove(target, source, bytes);
    } else if (!to_device) {
        memset(target, 0, bytes);  // else the host would read what lay in its memory before
    }
    return cudaSuccess;
}

cudaError_t launched() {
    count(LAUNCHES);
    return cudaSuccess;
}

cublasStatus_t multiplied() {
    count(LAUNCHES);
    count(PRODUCTS);
    return CUBLAS_STATUS_SUCCESS;
}

// Handles of streams, events and descriptors: different addresses, nothing more.
template <typename Handle>
void make(Handle* handle) {
    *handle = (Handle)malloc(8);
}

int succeed() { return 0; }

int primary_context_state(int, unsigned* flags, int* is_active) {
    *flags = 0;
    *is_active = 1;
    return 0;
}

}  // namespace

// --- for the meter --------------------------------------------------------------------------------------------------------

EXPORTED const char* pretend_names() { return NAMES; }

EXPORTED void pretend_counts(long long* values) {
    for (int number = 0; number < NUM_COUNTERS; number++) values[number] = counters[number];
}

EXPORTED void pretend_forget_largest() { counters[UP_PAGEABLE_LARGEST] = 0; }

EXPORTED void pretend_launched() { launched(); }  // for the driver

// --- the runtime: devices and errors --------------------------------------------------------------------------------------

// A call that has nothing to do.
#define SUCCEEDS(name, ...) \
    EXPORTED cudaError_t name(__VA_ARGS__) { return cudaSuccess; }
// A call that sets its first argument.
#define ANSWERS(name, first, value, ...)            \
    EXPORTED cudaError_t name(first, ##__VA_ARGS__) { \
        *result = value;                            \
        return cudaSuccess;                         \
    }

ANSWERS(cudaGetDeviceCount, int* result, num_gpus())
ANSWERS(cudaGetDevice, int* result, current_gpu)
ANSWERS(cudaDriverGetVersion, int* result, CUDART_VERSION)
ANSWERS(cudaRuntimeGetVersion, int* result, CUDART_VERSION)
ANSWERS(cudaDeviceCanAccessPeer, int* result, 0, int, int)
ANSWERS(cudaDeviceGetDefaultMemPool, cudaMemPool_t* result, (cudaMemPool_t)1, int)
SUCCEEDS(cudaDeviceEnablePeerAccess, int, unsigned)
SUCCEEDS(cudaMemPoolSetAttribute, cudaMemPool_t, cudaMemPoolAttr, void*)
SUCCEEDS(cudaMemPoolSetAccess, cudaMemPool_t, const cudaMemAccessDesc*, size_t)
SUCCEEDS(cudaMemPoolTrimTo, cudaMemPool_t, size_t)

EXPORTED cudaError_t cudaSetDevice(int gpu) {
    if (gpu < 0 || gpu >= num_gpus() || gpu >= MOST_GPUS) return failed(cudaErrorInvalidDevice);
    current_gpu = gpu;
    return cudaSuccess;
}

EXPORTED cudaError_t cudaGetLastError() {
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}

EXPORTED cudaError_t cudaPeekAtLastError() { return last_error; }

EXPORTED const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorMemoryAllocation ? "out of memory" : "an error of the pretend GPU";
}

EXPORTED const char* cudaGetErrorName(cudaError_t error) {
    return error == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "cudaErrorUnknown";
}

EXPORTED cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}

EXPORTED cudaError_t cudaDeviceGetPCIBusId(char* name, int room, int gpu) {
    snprintf(name, room, "0000:%02x:00.0", gpu);
    return cudaSuccess;
}

// The figures of an H200.
EXPORTED cudaError_t cudaGetDeviceProperties(cudaDeviceProp* facts, int) {
    *facts = {};
    strcpy(facts->name, "Pretend H200");
    facts->totalGlobalMem = total_bytes();
    facts->major = 9;
    facts->multiProcessorCount = 132;
    facts->warpSize = 32;
    facts->maxThreadsPerBlock = 1024;
    facts->maxThreadsPerMultiProcessor = 2048;
    facts->maxBlocksPerMultiProcessor = 32;
    facts->sharedMemPerBlock = 49152;
    facts->sharedMemPerBlockOptin = 232448;
    facts->sharedMemPerMultiprocessor = 233472;
    facts->regsPerBlock = facts->regsPerMultiprocessor = 65536;
    facts->l2CacheSize = 60 << 20;
    const int threads[] = {1024, 1024, 64}, blocks[] = {2147483647, 65535, 65535};
    memcpy(facts->maxThreadsDim, threads, sizeof threads);
    memcpy(facts->maxGridSize, blocks, sizeof blocks);
    facts->textureAlignment = 512;
    facts->asyncEngineCount = 3;
    facts->unifiedAddressing = facts->managedMemory = facts->concurrentKernels = facts->canMapHostMemory = 1;
    return cudaSuccess;
}

EXPORTED cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int gpu) {
    cudaDeviceProp facts;
    cudaGetDeviceProperties(&facts, gpu);
    switch (attribute) {
        case cudaDevAttrComputeCapabilityMajor: *value = facts.major; break;
        case cudaDevAttrComputeCapabilityMinor: *value = facts.minor; break;
        case cudaDevAttrMultiProcessorCount: *value = facts.multiProcessorCount; break;
        case cudaDevAttrWarpSize: *value = facts.warpSize; break;
        case cudaDevAttrMaxThreadsPerBlock: *value = facts.maxThreadsPerBlock; break;
        case cudaDevAttrMaxThreadsPerMultiProcessor: *value = facts.maxThreadsPerMultiProcessor; break;
        case cudaDevAttrMaxSharedMemoryPerBlock: *value = (int)facts.sharedMemPerBlock; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = (int)facts.sharedMemPerBlockOptin; break;
        case cudaDevAttrMaxGridDimX: *value = facts.maxGridSize[0]; break;
        case cudaDevAttrMaxGridDimY: *value = facts.maxGridSize[1]; break;
        case cudaDevAttrMaxGridDimZ: *value = facts.maxGridSize[2]; break;
        default: *value = 1;
    }
    return cudaSuccess;
}

EXPORTED cudaError_t cudaGetDriverEntryPointByVersion(
    const char* name, void** entry, unsigned, unsigned long long, cudaDriverEntryPointQueryResult* result) {
    bool is_state = !strcmp(name, "cuDevicePrimaryCtxGetState");
    *entry = is_state ? (void*)primary_context_state : (void*)succeed;
    if (result) *result = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

// --- the runtime: memory --------------------------------------------------------------------------------------------------

EXPORTED cudaError_t cudaMalloc(void** address, size_t bytes) { return take_memory(address, bytes); }
EXPORTED cudaError_t cudaMallocAsync(void** address, size_t bytes, cudaStream_t) { return take_memory(address, bytes); }
EXPORTED cudaError_t cudaFreeAsync(void* address, cudaStream_t) { return give_memory_back(address); }

EXPORTED cudaError_t cudaFree(void* address) {
    if (address) count(WAIT_FREE);
    return give_memory_back(address);
}

EXPORTED cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
    std::lock_guard<std::mutex> held(lock);
    *total = total_bytes();
    *free = *total - used_bytes[current_gpu];
    return cudaSuccess;
}

EXPORTED cudaError_t cudaHostRegister(void* address, size_t bytes, unsigned) {
    std::lock_guard<std::mutex> held(lock);
    pinned_blocks[(const char*)address] = {bytes, current_gpu};
    return cudaSuccess;
}

EXPORTED cudaError_t cudaHostUnregister(void* address) {
    std::lock_guard<std::mutex> held(lock);
    pinned_blocks.erase((const char*)address);
    return cudaSuccess;
}

EXPORTED cudaError_t cudaHostAlloc(void** address, size_t bytes, unsigned) {
    if (posix_memalign(address, 4096, bytes ? bytes : 1)) return failed(cudaErrorMemoryAllocation);
    return cudaHostRegister(*address, bytes, 0);
}

EXPORTED cudaError_t cudaFreeHost(void* address) {
    cudaHostUnregister(address);
    free(address);
    return cudaSuccess;
}

EXPORTED cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* facts, const void* address) {
    std::lock_guard<std::mutex> held(lock);
    *facts = {};
    if (const Block* block = block_of(device_blocks, address)) {
        facts->type = cudaMemoryTypeDevice;
        facts->device = block->gpu;
        facts->devicePointer = (void*)address;
    } else if (block_of(pinned_blocks, address)) {
        facts->type = cudaMemoryTypeHost;
        facts->hostPointer = facts->devicePointer = (void*)address;
    } else {
        facts->type = cudaMemoryTypeUnregistered;
        facts->device = -2;
    }
    return cudaSuccess;
}

EXPORTED cudaError_t cudaMemcpy(void* target, const void* source, size_t bytes, cudaMemcpyKind) {
    count(WAIT_DEVICE);
    return copy(target, source, bytes);
}

EXPORTED cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t bytes, cudaMemcpyKind, cudaStream_t) {
    return copy(target, source, bytes);
}

EXPORTED cudaError_t cudaMemcpyPeerAsync(void* target, int, const void* source, int, size_t bytes, cudaStream_t) {
    return copy(target, source, bytes);
}

EXPORTED cudaError_t cudaMemcpy2DAsync(
    void* target, size_t target_pitch, const void* source, size_t source_pitch, size_t width, size_t height, cudaMemcpyKind,
    cudaStream_t) {
    for (size_t row = 0; row < height; row++)
        copy((char*)target + row * target_pitch, (const char*)source + row * source_pitch, width);
    return cudaSuccess;
}

EXPORTED cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t) {
    if (bytes <= (size_t)setting("PRETEND_COPY_BYTES", 8 << 20)) memset(address, value, bytes);
    return cudaSuccess;
}

EXPORTED cudaError_t cudaMemset(void* address, int value, size_t bytes) { return cudaMemsetAsync(address, value, bytes, 0); }

EXPORTED cudaError_t cudaGetSymbolAddress(void** address, const void*) {
    static char room[1 << 20];  // larger than any variable of PyTorch's kernels
    *address = room;
    return cudaSuccess;
}
SUCCEEDS(cudaMemcpyToSymbol, const void*, const void*, size_t, size_t, cudaMemcpyKind)

// --- the runtime: streams and events --------------------------------------------------------------------------------------

EXPORTED cudaError_t cudaStreamCreate(cudaStream_t* stream) {
    make(stream);
    return cudaSuccess;
}
EXPORTED cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return cudaStreamCreate(stream); }
EXPORTED cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) { return cudaStreamCreate(stream); }
SUCCEEDS(cudaStreamDestroy, cudaStream_t)
SUCCEEDS(cudaStreamQuery, cudaStream_t)
SUCCEEDS(cudaStreamWaitEvent, cudaStream_t, cudaEvent_t, unsigned)
ANSWERS(cudaStreamGetPriority, cudaStream_t, 0, int* result)
SUCCEEDS(cudaThreadExchangeStreamCaptureMode, cudaStreamCaptureMode*)
ANSWERS(cudaStreamIsCapturing, cudaStream_t, cudaStreamCaptureStatusNone, cudaStreamCaptureStatus* result)

EXPORTED cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t, cudaStreamCaptureStatus* status, unsigned long long* number, cudaGraph_t*, const cudaGraphNode_t**,
    const cudaGraphEdgeData**, size_t*) {
    if (status) *status = cudaStreamCaptureStatusNone;
    if (number) *number = 0;
    return cudaSuccess;
}

EXPORTED cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void* argument) {
    function(argument);
    return cudaSuccess;
}

EXPORTED cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t function, void* argument, unsigned) {
    function(stream, cudaSuccess, argument);
    return cudaSuccess;
}

EXPORTED cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
    make(event);
    return cudaSuccess;
}
EXPORTED cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
EXPORTED cudaError_t cudaEventDestroy(cudaEvent_t event) {
    free(event);
    return cudaSuccess;
}
SUCCEEDS(cudaEventRecord, cudaEvent_t, cudaStream_t)
SUCCEEDS(cudaEventRecordWithFlags, cudaEvent_t, cudaStream_t, unsigned)
SUCCEEDS(cudaEventQuery, cudaEvent_t)
ANSWERS(cudaEventElapsedTime, float* result, 1, cudaEvent_t, cudaEvent_t)

// What waits.
#define WAITS(name, counter, ...)            \
    EXPORTED cudaError_t name(__VA_ARGS__) { \
        count(counter);                      \
        return cudaSuccess;                  \
    }
WAITS(cudaEventSynchronize, WAIT_EVENT, cudaEvent_t)
WAITS(cudaStreamSynchronize, WAIT_STREAM, cudaStream_t)
WAITS(cudaDeviceSynchronize, WAIT_DEVICE)

// --- the runtime: kernels -------------------------------------------------------------------------------------------------

#define LAUNCHES_ONE(name, ...) \
    EXPORTED cudaError_t name(__VA_ARGS__) { return launched(); }
LAUNCHES_ONE(cudaLaunchKernel, const void*, dim3, dim3, void**, size_t, cudaStream_t)
LAUNCHES_ONE(cudaLaunchKernelExC, const cudaLaunchConfig_t*, const void*, void**)
LAUNCHES_ONE(__cudaLaunchKernel, cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t)

EXPORTED cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
    *kernel = (cudaKernel_t)function;
    return cudaSuccess;
}

EXPORTED cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* facts, const void*) {
    *facts = {};
    facts->maxThreadsPerBlock = 1024;
    facts->numRegs = 32;
    facts->ptxVersion = facts->binaryVersion = 90;
    facts->maxDynamicSharedSizeBytes = 232448;
    return cudaSuccess;
}
SUCCEEDS(cudaFuncSetAttribute, const void*, cudaFuncAttribute, int)
SUCCEEDS(cudaKernelSetAttributeForDevice, cudaKernel_t, cudaFuncAttribute, int, int)
ANSWERS(cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags, int* result, 2, const void*, int, size_t, unsigned)
SUCCEEDS(cudaProfilerStart)
SUCCEEDS(cudaProfilerStop)

// --- cuBLAS ---------------------------------------------------------------------------------------------------------------

#define AGREES(name, ...) \
    EXPORTED cublasStatus_t name(__VA_ARGS__) { return CUBLAS_STATUS_SUCCESS; }
#define MAKES(name, handle, ...)                       \
    EXPORTED cublasStatus_t name(handle, ##__VA_ARGS__) { \
        make(made);                                    \
        return CUBLAS_STATUS_SUCCESS;                  \
    }
#define MULTIPLIES(name, ...) \
    EXPORTED cublasStatus_t name(__VA_ARGS__) { return multiplied(); }

MAKES(cublasCreate_v2, cublasHandle_t* made)
AGREES(cublasDestroy_v2, cublasHandle_t)
AGREES(cublasSetStream_v2, cublasHandle_t, cudaStream_t)
AGREES(cublasSetWorkspace_v2, cublasHandle_t, void*, size_t)
AGREES(cublasSetMathMode, cublasHandle_t, cublasMath_t)
AGREES(cublasSetPointerMode_v2, cublasHandle_t, cublasPointerMode_t)
AGREES(cublasSetSmCountTarget, cublasHandle_t, int)

EXPORTED cublasStatus_t cublasGetMathMode(cublasHandle_t, cublasMath_t* mode) {
    *mode = CUBLAS_DEFAULT_MATH;
    return CUBLAS_STATUS_SUCCESS;
}

EXPORTED cublasStatus_t cublasGetPointerMode_v2(cublasHandle_t, cublasPointerMode_t* mode) {
    *mode = CUBLAS_POINTER_MODE_HOST;
    return CUBLAS_STATUS_SUCCESS;
}

using Handle = cublasHandle_t;
using Turn = cublasOperation_t;
MULTIPLIES(cublasGemmEx, Handle, Turn, Turn, int, int, int, const void*, const void*, cudaDataType, int, const void*, cudaDataType,
           int, const void*, void*, cudaDataType, int, cublasComputeType_t, cublasGemmAlgo_t)
MULTIPLIES(cublasGemmStridedBatchedEx, Handle, Turn, Turn, int, int, int, const void*, const void*, cudaDataType, int, long long,
           const void*, cudaDataType, int, long long, const void*, void*, cudaDataType, int, long long, int, cublasComputeType_t,
           cublasGemmAlgo_t)

// The products that have a name for each type of number.
#define TYPED_PRODUCTS(S, number)                                                                                              \
    MULTIPLIES(cublas##S##gemm_v2, Handle, Turn, Turn, int, int, int, const number*, const number*, int, const number*, int,  \
               const number*, number*, int)                                                                                    \
    MULTIPLIES(cublas##S##gemmStridedBatched, Handle, Turn, Turn, int, int, int, const number*, const number*, int, long long, \
               const number*, int, long long, const number*, number*, int, long long, int)                                     \
    MULTIPLIES(cublas##S##gemv_v2, Handle, Turn, int, int, const number*, const number*, int, const number*, int,              \
               const number*, number*, int)                                                                                    \
    EXPORTED cublasStatus_t cublas##S##dot_v2(Handle, int, const number*, int, const number*, int, number* result) {           \
        *result = 0;                                                                                                           \
        return multiplied();                                                                                                   \
    }
TYPED_PRODUCTS(S, float)
TYPED_PRODUCTS(D, double)

EXPORTED size_t cublasLtGetVersion() { return CUBLAS_VERSION; }
MAKES(cublasLtMatmulDescCreate, cublasLtMatmulDesc_t* made, cublasComputeType_t, cudaDataType_t)
MAKES(cublasLtMatrixLayoutCreate, cublasLtMatrixLayout_t* made, cudaDataType, uint64_t, uint64_t, int64_t)
MAKES(cublasLtMatmulPreferenceCreate, cublasLtMatmulPreference_t* made)
AGREES(cublasLtMatmulDescSetAttribute, cublasLtMatmulDesc_t, cublasLtMatmulDescAttributes_t, const void*, size_t)
AGREES(cublasLtMatrixLayoutSetAttribute, cublasLtMatrixLayout_t, cublasLtMatrixLayoutAttribute_t, const void*, size_t)
AGREES(cublasLtMatmulPreferenceSetAttribute, cublasLtMatmulPreference_t, cublasLtMatmulPreferenceAttributes_t, const void*, size_t)

EXPORTED cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t made) {
    free(made);
    return CUBLAS_STATUS_SUCCESS;
}
EXPORTED cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t made) {
    free(made);
    return CUBLAS_STATUS_SUCCESS;
}
EXPORTED cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t made) {
    free(made);
    return CUBLAS_STATUS_SUCCESS;
}

EXPORTED cublasStatus_t cublasLtMatmulAlgoGetHeuristic(
    cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
    cublasLtMatrixLayout_t, cublasLtMatmulPreference_t, int, cublasLtMatmulHeuristicResult_t results[], int* num_results) {
    results[0] = {};
    *num_results = 1;
    return CUBLAS_STATUS_SUCCESS;
}

MULTIPLIES(cublasLtMatmul, cublasLtHandle_t, cublasLtMatmulDesc_t, const void*, const void*, cublasLtMatrixLayout_t, const void*,
           cublasLtMatrixLayout_t, const void*, const void*, cublasLtMatrixLayout_t, void*, cublasLtMatrixLayout_t,
           const cublasLtMatmulAlgo_t*, void*, size_t, cudaStream_t)
