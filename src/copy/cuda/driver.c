/* driver.c - see driver.h. */
#include "copy/cuda/driver.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>

#include "base/log.h"
#include "base/util.h"

#define CU_LIBRARY "libcuda.so.1"

static struct fk_cuda driver;
static bool ready;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

struct symbol { const char *name; size_t at; bool optional; };
#define SYMBOL(field, name) { name, offsetof(struct fk_cuda, field), false }

static const struct symbol symbols[] = {
    SYMBOL(Init, "cuInit"), SYMBOL(DriverGetVersion, "cuDriverGetVersion"),
    SYMBOL(GetErrorName, "cuGetErrorName"), SYMBOL(DeviceGet, "cuDeviceGet"),
    SYMBOL(DeviceGetCount, "cuDeviceGetCount"),
    SYMBOL(DeviceGetUuid, "cuDeviceGetUuid_v2"),
    SYMBOL(DeviceGetAttribute, "cuDeviceGetAttribute"),
    SYMBOL(DevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain"),
    SYMBOL(DevicePrimaryCtxRelease, "cuDevicePrimaryCtxRelease_v2"),
    SYMBOL(CtxSetCurrent, "cuCtxSetCurrent"),
    SYMBOL(CtxGetStreamPriorityRange, "cuCtxGetStreamPriorityRange"),
    SYMBOL(CtxSynchronize, "cuCtxSynchronize"), SYMBOL(ModuleLoadData, "cuModuleLoadData"),
    SYMBOL(ModuleUnload, "cuModuleUnload"), SYMBOL(ModuleGetFunction, "cuModuleGetFunction"),
    SYMBOL(LaunchKernel, "cuLaunchKernel"),
    SYMBOL(StreamCreateWithPriority, "cuStreamCreateWithPriority"),
    SYMBOL(StreamDestroy, "cuStreamDestroy_v2"), SYMBOL(StreamWaitEvent, "cuStreamWaitEvent"),
    SYMBOL(StreamSynchronize, "cuStreamSynchronize"), SYMBOL(EventCreate, "cuEventCreate"),
    SYMBOL(EventDestroy, "cuEventDestroy_v2"), SYMBOL(EventRecord, "cuEventRecord"),
    SYMBOL(EventQuery, "cuEventQuery"),
    SYMBOL(MemAlloc, "cuMemAlloc_v2"), SYMBOL(MemFree, "cuMemFree_v2"),
    SYMBOL(MemHostAlloc, "cuMemHostAlloc"), SYMBOL(MemFreeHost, "cuMemFreeHost"),
    SYMBOL(MemHostRegister, "cuMemHostRegister_v2"),
    SYMBOL(MemHostUnregister, "cuMemHostUnregister"),
    SYMBOL(MemcpyHtoDAsync, "cuMemcpyHtoDAsync_v2"), SYMBOL(MemcpyDtoHAsync, "cuMemcpyDtoHAsync_v2"),
    SYMBOL(MemcpyHtoD, "cuMemcpyHtoD_v2"), SYMBOL(MemcpyDtoH, "cuMemcpyDtoH_v2"),
    SYMBOL(PointerGetAttributes, "cuPointerGetAttributes"),
    SYMBOL(ThreadExchangeStreamCaptureMode, "cuThreadExchangeStreamCaptureMode"),
    { "cuLaunchHostFunc", offsetof(struct fk_cuda, LaunchHostFunc), true },
    { "cuMemcpyBatchAsync", offsetof(struct fk_cuda, MemcpyBatch128), true },
    { "cuMemcpyBatchAsync_v2", offsetof(struct fk_cuda, MemcpyBatch130), true },
};

static bool find_symbols(void *library)
{
    for (size_t i = 0; i < fk_array_size(symbols); i++) {
        void *p = dlsym(library, symbols[i].name);
        if (!p && !symbols[i].optional) {
            fk_warn("the CUDA driver has no %s: it is too old, GPU memory can't be used",
                    symbols[i].name);
            return false;
        }
        memcpy((char *)&driver + symbols[i].at, &p, sizeof(p));
    }
    return true;
}

static bool start(bool load)
{
    void *library = dlopen(CU_LIBRARY, RTLD_NOW | RTLD_LOCAL | (load ? 0 : RTLD_NOLOAD));

    if (!library || !find_symbols(library))
        return false;
    cu_result r = driver.Init(0);
    if (r == CU_OK)
        r = driver.DriverGetVersion(&driver.version);
    if (r != CU_OK)
        fk_warn("the CUDA driver does not start (%s): GPU memory can't be used",
                fk_cuda_error(&driver, r));
    return r == CU_OK;
}

const struct fk_cuda *fk_cuda_driver(bool load)
{
    pthread_mutex_lock(&lock);
    if (!ready)
        ready = start(load);
    pthread_mutex_unlock(&lock);
    return ready ? &driver : NULL;
}

const char *fk_cuda_error(const struct fk_cuda *cu, cu_result r)
{
    const char *name = NULL;

    return cu->GetErrorName && cu->GetErrorName(r, &name) == CU_OK && name ? name : "unknown error";
}

int fk_cuda_device_of(const struct fk_cuda *cu, const void *address)
{
    unsigned type = 0;
    int device = -1, asked[] = { CU_POINTER_MEMORY_TYPE, CU_POINTER_DEVICE_ORDINAL };
    void *answers[] = { &type, &device };

    if (cu->PointerGetAttributes(2, asked, answers, (cu_ptr)(uintptr_t)address) != CU_OK ||
        type != CU_MEMORY_DEVICE)
        return -1;
    return device;
}
