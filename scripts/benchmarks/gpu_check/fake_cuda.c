/* An H100 that computes nothing: what PyTorch and Triton call of CUDA's runtime and driver, for a machine without a GPU.

Memory is the host's, of allocations and copies that really happen; streams, events and graphs have states and times.
Kernels, and with them the libraries' functions, do nothing: fresh memory is zero, and so is every number that a kernel
should have made. What the real library refuses is refused: CUDA in a process forked from one that has started it,
host pointers in Triton's launches. fake_cuda.py adds a function that succeeds for every name that is not here. */

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define NAME "NVIDIA H100 80GB HBM3"
#define MEMORY (80UL << 30)
#define ADDRESSES (1UL << 43) /* of which MEMORY at most is in use */
#define PAGE (1UL << 16)
#define LARGE (64UL << 20) /* bytes from which on copies between device buffers, mostly of zeros, are left out */

typedef struct { enum cudaStreamCaptureStatus status; } Stream;
typedef struct { struct timespec at; } Event;

static int started, is_bad_fork;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char *memory;
static size_t used, most_used, next_page;
static unsigned pages[ADDRESSES / PAGE];                  /* of the allocation that begins there */
static unsigned next_freed[ADDRESSES / PAGE], freed[64]; /* by size, in powers of two; one more than the page */
static Stream default_stream;
static char thing[1 << 16]; /* what handles point to */

static void before_fork(void) { pthread_mutex_lock(&lock); }
static void in_parent(void) { pthread_mutex_unlock(&lock); }
static void in_child(void)
{
    pthread_mutex_unlock(&lock);
    is_bad_fork |= started;
}
__attribute__((constructor)) static void at_load(void) { pthread_atfork(before_fork, in_parent, in_child); }

static int start(void)
{
    const char *visible = getenv("CUDA_VISIBLE_DEVICES");
    if (is_bad_fork) return cudaErrorInitializationError;
    if (visible && !*visible) return cudaErrorNoDevice;
    pthread_mutex_lock(&lock);
    if (!started) {
        memory = mmap(NULL, ADDRESSES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) { perror("fake_cuda: mmap"); abort(); }
        started = 1;
    }
    pthread_mutex_unlock(&lock);
    return 0;
}

static const char *error_string(int error)
{
    switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInitializationError: return "initialization error";
    case cudaErrorNoDevice: return "no CUDA-capable device is detected";
    default: return "unknown error";
    }
}
const char *cudaGetErrorString(cudaError_t error) { return error_string(error); }
const char *cudaGetErrorName(cudaError_t error) { return error_string(error); }
CUresult cuGetErrorString(CUresult error, const char **s) { *s = error_string(error); return 0; }

/* The device. */

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device)
{
    int error = start();
    memset(p, 0, sizeof *p); /* an identifier of zeros, by which a record knows that nothing was measured */
    strcpy(p->name, NAME);
    p->major = 9;
    p->multiProcessorCount = 132;
    p->totalGlobalMem = MEMORY;
    p->l2CacheSize = 50 << 20;
    p->memoryBusWidth = 5120;
    p->warpSize = 32;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->sharedMemPerBlock = 48 << 10;
    p->sharedMemPerBlockOptin = 227 << 10;
    p->sharedMemPerMultiprocessor = 228 << 10;
    p->reservedSharedMemPerBlock = 1 << 10;
    p->totalConstMem = 64 << 10;
    p->maxThreadsPerBlock = 1024;
    p->maxThreadsPerMultiProcessor = 2048;
    p->maxBlocksPerMultiProcessor = 32;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 2147483647;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->memPitch = 2147483647;
    p->textureAlignment = 512;
    p->asyncEngineCount = 3;
    p->concurrentKernels = p->canMapHostMemory = p->unifiedAddressing = p->streamPrioritiesSupported = 1;
    p->cooperativeLaunch = p->clusterLaunch = p->ECCEnabled = 1;
    return error;
}
static int attribute(int *value, int which)
{
    struct cudaDeviceProp p;
    int error = cudaGetDeviceProperties(&p, 0);
    switch (which) {
    case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
    case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
    case cudaDevAttrL2CacheSize: *value = p.l2CacheSize; break;
    case cudaDevAttrGlobalMemoryBusWidth: *value = p.memoryBusWidth; break;
    case cudaDevAttrClockRate: *value = 1980000; break;
    case cudaDevAttrMemoryClockRate: *value = 2619000; break;
    case cudaDevAttrWarpSize: *value = p.warpSize; break;
    case cudaDevAttrMaxRegistersPerBlock: *value = p.regsPerBlock; break;
    case cudaDevAttrMaxRegistersPerMultiprocessor: *value = p.regsPerMultiprocessor; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = p.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = p.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = p.sharedMemPerMultiprocessor; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = p.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *value = p.maxBlocksPerMultiProcessor; break;
    case cudaDevAttrMaxGridDimX: *value = p.maxGridSize[0]; break;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: *value = p.maxGridSize[1]; break;
    case cudaDevAttrComputeCapabilityMinor:
    case cudaDevAttrComputeMode:
    case cudaDevAttrIntegrated: *value = 0; break;
    default: *value = 1; /* the rest are mostly abilities */
    }
    return error;
}
static int count_devices(int *count) { int error = start(); *count = !error; return error; }
cudaError_t cudaGetDeviceCount(int *count) { return count_devices(count); }
cudaError_t cudaGetDevice(int *device) { *device = 0; return start(); }
cudaError_t cudaSetDevice(int device) { return start(); }
cudaError_t cudaDeviceSynchronize(void) { return start(); }
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr which, int device) { return attribute(value, which); }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return 0; }
cudaError_t cudaDeviceGetPCIBusId(char *s, int size, int device) { snprintf(s, size, "00000000:00:00.0"); return 0; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) { *can = 0; return 0; }
cudaError_t cudaDriverGetVersion(int *version) { *version = CUDART_VERSION; return 0; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = CUDART_VERSION; return 0; }
CUresult cuInit(unsigned flags) { return start(); }
CUresult cuDriverGetVersion(int *version) { *version = CUDA_VERSION; return 0; }
CUresult cuDeviceGetCount(int *count) { return count_devices(count); }
CUresult cuDeviceGet(CUdevice *device, int i) { *device = 0; return start(); }
CUresult cuDeviceGetName(char *s, int size, CUdevice device) { snprintf(s, size, NAME); return 0; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute which, CUdevice device) { return attribute(value, which); }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { *context = (void *)thing; return start(); }
CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *is_active)
{
    *flags = 0;
    *is_active = started;
    return 0;
}
CUresult cuCtxGetCurrent(CUcontext *context) { *context = (void *)thing; return 0; }
CUresult cuCtxGetDevice(CUdevice *device) { *device = 0; return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 1; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **device) { *device = thing; return 0; }
int nvmlDeviceGetUUID(void *device, char *s, unsigned size)
{
    snprintf(s, size, "GPU-00000000-0000-0000-0000-000000000000");
    return 0;
}

/* Memory. */

static int size_class(size_t count)
{
    int power = 0;
    while (1UL << power < count) power++;
    return power;
}
static int allocate(void **p, size_t size)
{
    int error = start();
    size_t count = size ? (size - 1) / PAGE + 1 : 1, at;
    int power = size_class(count);
    if (error) return error;
    pthread_mutex_lock(&lock);
    if (used + count * PAGE > MEMORY) {
        error = cudaErrorMemoryAllocation;
    } else {
        if (freed[power]) {
            at = freed[power] - 1;
            freed[power] = next_freed[at];
        } else {
            at = next_page;
            next_page += 1UL << power;
            if (next_page > ADDRESSES / PAGE) { fprintf(stderr, "fake_cuda: out of addresses\n"); abort(); }
        }
        pages[at] = count;
        used += count * PAGE;
        if (used > most_used) most_used = used;
        *p = memory + at * PAGE;
    }
    pthread_mutex_unlock(&lock);
    return error;
}
static int release(void *p)
{
    size_t at = ((char *)p - memory) / PAGE;
    int power = size_class(pages[at]);
    if (!p) return 0;
    pthread_mutex_lock(&lock);
    madvise(p, pages[at] * PAGE, MADV_DONTNEED); /* zero when it is next used */
    used -= pages[at] * PAGE;
    next_freed[at] = freed[power];
    freed[power] = at + 1;
    pthread_mutex_unlock(&lock);
    return 0;
}
static int is_on_device(const void *p) { return memory && (char *)p >= memory && (char *)p < memory + ADDRESSES; }
static int copy(void *to, const void *from, size_t size)
{
    int error = start();
    if (!error && !(size > LARGE && is_on_device(to) && is_on_device(from))) memmove(to, from, size);
    return error;
}
cudaError_t cudaMalloc(void **p, size_t size) { return allocate(p, size); }
cudaError_t cudaMallocAsync(void **p, size_t size, cudaStream_t stream) { return allocate(p, size); }
cudaError_t cudaFree(void *p) { return release(p); }
cudaError_t cudaFreeAsync(void *p, cudaStream_t stream) { return release(p); }
cudaError_t cudaHostAlloc(void **p, size_t size, unsigned flags)
{
    size = (size + 4095) & -4096UL;
    *p = memset(aligned_alloc(4096, size), 0, size);
    return start();
}
cudaError_t cudaFreeHost(void *p) { free(p); return 0; }
cudaError_t cudaMemGetInfo(size_t *available, size_t *total)
{
    *available = MEMORY - used;
    *total = MEMORY;
    return start();
}
cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr which, void *value)
{
    int is_high = which == cudaMemPoolAttrUsedMemHigh || which == cudaMemPoolAttrReservedMemHigh;
    *(size_t *)value = is_high ? most_used : used;
    return 0;
}
cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr which, void *value)
{
    if (which == cudaMemPoolAttrUsedMemHigh) most_used = used;
    return 0;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind)
{
    return copy(to, from, size);
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream)
{
    return copy(to, from, size);
}
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
                              size_t height, enum cudaMemcpyKind kind, cudaStream_t stream)
{
    for (size_t i = 0; i < height; i++) copy((char *)to + i * to_pitch, (const char *)from + i * from_pitch, width);
    return 0;
}
static int set(void *p, int value, size_t size)
{
    if (size <= LARGE) memset(p, value, size);
    return start();
}
cudaError_t cudaMemset(void *p, int value, size_t size) { return set(p, value, size); }
cudaError_t cudaMemsetAsync(void *p, int value, size_t size, cudaStream_t stream) { return set(p, value, size); }
cudaError_t cudaGetSymbolAddress(void **p, const void *symbol) { *p = thing; return 0; }
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *p)
{
    memset(attributes, 0, sizeof *attributes);
    attributes->type = is_on_device(p) ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
    attributes->devicePointer = is_on_device(p) ? (void *)p : NULL;
    return 0;
}
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute which, CUdeviceptr p)
{
    if (!is_on_device((void *)p)) return CUDA_ERROR_INVALID_VALUE;
    *(CUdeviceptr *)value = which == CU_POINTER_ATTRIBUTE_DEVICE_POINTER ? p : 0;
    return 0;
}

/* Streams, graphs, events. */

static Stream *stream_of(cudaStream_t stream) { return (size_t)stream <= 2 ? &default_stream : (Stream *)stream; }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority)
{
    *stream = calloc(1, sizeof(Stream));
    return start();
}
cudaError_t cudaStreamCreate(cudaStream_t *stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) { free(stream); return 0; }
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) { *priority = 0; return 0; }
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status)
{
    *status = stream_of(stream)->status;
    return 0;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **dependencies,
                                     const cudaGraphEdgeData **edges, size_t *count)
{
    *status = stream_of(stream)->status;
    if (id) *id = 1;
    if (graph) *graph = (void *)thing;
    if (dependencies) *dependencies = NULL;
    if (edges) *edges = NULL;
    if (count) *count = 0;
    return 0;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode)
{
    stream_of(stream)->status = cudaStreamCaptureStatusActive;
    return 0;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph)
{
    stream_of(stream)->status = cudaStreamCaptureStatusNone;
    *graph = (void *)thing;
    return 0;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) { *count = 1; return 0; }
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long flags)
{
    *exec = (void *)thing;
    return 0;
}
static int new_event(cudaEvent_t *event) { *event = calloc(1, sizeof(Event)); return start(); }
static int record(cudaEvent_t event) { return clock_gettime(CLOCK_MONOTONIC, &((Event *)event)->at); }
cudaError_t cudaEventCreate(cudaEvent_t *event) { return new_event(event); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { return new_event(event); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { free(event); return 0; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { return record(event); }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) { return record(event); }
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t first, cudaEvent_t second)
{
    struct timespec a = ((Event *)first)->at, b = ((Event *)second)->at;
    *milliseconds = 1e3 * (b.tv_sec - a.tv_sec) + 1e-6 * (b.tv_nsec - a.tv_nsec);
    return 0;
}

/* Modules and kernels. */

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *function)
{
    memset(attributes, 0, sizeof *attributes);
    attributes->maxThreadsPerBlock = 1024;
    attributes->numRegs = 32;
    attributes->ptxVersion = attributes->binaryVersion = 90;
    return start();
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *f, int threads, size_t shared)
{
    *blocks = 2;
    return 0;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *f, int threads,
                                                                   size_t shared, unsigned flags)
{
    *blocks = 2;
    return 0;
}
void **__cudaRegisterFatBinary(void *binary) { static void *handle; return &handle; }
static int load(void *module) { *(void **)module = thing; return start(); }
// NVRTC asks for tables of the driver's own.
CUresult cuGetExportTable(const void **table, const CUuuid *id) { return CUDA_ERROR_NOT_FOUND; }
CUresult cuModuleLoad(CUmodule *module, const char *path) { return load(module); }
CUresult cuModuleLoadData(CUmodule *module, const void *image) { return load(module); }
CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned count, CUjit_option *options, void **values)
{
    return load(module);
}
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name)
{
    *function = (void *)thing;
    return 0;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute which, CUfunction function)
{
    *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : which == CU_FUNC_ATTRIBUTE_NUM_REGS ? 32 : 0;
    return 0;
}
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, CUfunction function, int threads, size_t shared)
{
    *blocks = 2;
    return 0;
}
CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction function, const CUlaunchConfig *config)
{
    *clusters = 16;
    return 0;
}
static int nothing(void) { return 0; }
static void *find(const char *name)
{
    char versioned[256];
    void *function = dlsym(RTLD_DEFAULT, name);
    snprintf(versioned, sizeof versioned, "%s_v2", name);
    if (!function) function = dlsym(RTLD_DEFAULT, versioned);
    return function ? function : (void *)nothing;
}
CUresult cuGetProcAddress_v2(const char *name, void **function, int version, cuuint64_t flags,
                             CUdriverProcAddressQueryResult *found)
{
    *function = find(name);
    if (found) *found = CU_GET_PROC_ADDRESS_SUCCESS;
    return 0;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                             unsigned long long flags, enum cudaDriverEntryPointQueryResult *found)
{
    *function = find(name);
    if (found) *found = cudaDriverEntryPointSuccess;
    return 0;
}

/* The libraries, where more than success is needed. Collectives are those of one process. */

size_t cublasLtGetVersion(void) { return 130101; }
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *operation, void *a, void *b, void *c, void *d, void *preference,
                                   int wanted, void *results, int *found)
{
    *found = 1;
    return 0;
}
size_t cudnnGetVersion(void) { return 91900; }
size_t cudnnGetCudartVersion(void) { return CUDART_VERSION; }
const char *cudnnGetErrorString(int error) { return "no error"; }
void cudnnGetLastErrorString(char *s, size_t size) { if (size) *s = 0; }
int cudnnBackendCreateDescriptor(int type, void **descriptor) { *descriptor = calloc(1, 4096); return 0; }
int cudnnBackendGetAttribute(void *descriptor, int name, int type, long wanted, long *count, void *values)
{
    enum { INT64 = 3, INT32 = 23 };
    if (values && type == INT64) *(long *)values = 0;
    if (values && type == INT32) *(int *)values = 0;
    if (count) *count = 1;
    return 0;
}
static int collect(void *to, const void *from, size_t count, int type)
{
    static const int size[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};
    return copy(to, from, count * size[type]);
}
int ncclAllReduce(void *a, void *b, size_t n, int type, int op, void *comm, void *s) { return collect(b, a, n, type); }
int ncclReduceScatter(void *a, void *b, size_t n, int t, int op, void *comm, void *s) { return collect(b, a, n, t); }
int ncclReduce(void *a, void *b, size_t n, int t, int op, int r, void *comm, void *s) { return collect(b, a, n, t); }
int ncclAllGather(void *a, void *b, size_t n, int type, void *comm, void *s) { return collect(b, a, n, type); }
int ncclBroadcast(void *a, void *b, size_t n, int type, int r, void *comm, void *s) { return collect(b, a, n, type); }
int ncclCommCount(void *comm, int *count) { *count = 1; return 0; }
int ncclCommUserRank(void *comm, int *rank) { *rank = 0; return 0; }
int ncclCommGetAsyncError(void *comm, int *error) { *error = 0; return 0; }
int ncclGetVersion(int *version) { *version = 22809; return 0; }
const char *ncclGetErrorString(int error) { return "no error"; }
const char *ncclGetLastError(void *comm) { return "no error"; }
int ncclMemAlloc(void **p, size_t size) { return allocate(p, size); }
int ncclMemFree(void *p) { return release(p); }
