/*
 * driver.h - the part of the CUDA driver API that FlexKV uses, found at run time: no CUDA is needed
 * to build or to start. Names, signatures and numbers as in NVIDIA's "CUDA Driver API" manual (12.8
 * and 13.0); a function that an older driver lacks is NULL where the comment says so.
 *
 * Nothing is loaded unless the process has a CUDA driver in use already, or `load` asks for it.
 */
#ifndef FK_COPY_CUDA_DRIVER_H
#define FK_COPY_CUDA_DRIVER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef int cu_result;
typedef int cu_device;
typedef struct cu_context_s *cu_context;
typedef struct cu_module_s *cu_module;
typedef struct cu_function_s *cu_function;
typedef struct cu_stream_s *cu_stream;
typedef struct cu_event_s *cu_event;
typedef uint64_t cu_ptr;

enum {
    CU_OK = 0, CU_ERROR_OUT_OF_MEMORY = 2, CU_ERROR_NOT_READY = 600,
    CU_STREAM_NON_BLOCKING_FLAG = 1, CU_EVENT_NO_TIMING = 2,
    CU_HOST_REGISTER_PORTABLE = 1, CU_HOST_REGISTER_DEVICE_MAP = 2,
    CU_HOST_ALLOC_PORTABLE = 1,
    CU_POINTER_MEMORY_TYPE = 2, CU_POINTER_DEVICE_ORDINAL = 9,
    CU_MEMORY_DEVICE = 2,
    CU_DEVICE_MULTIPROCESSORS = 16, CU_DEVICE_CC_MAJOR = 75, CU_DEVICE_CC_MINOR = 76,
    CU_DEVICE_HOST_POINTERS = 91,       /* a registered host pointer is valid on the device */
    CU_DEVICE_NUMA_ID = 134,
    CU_BATCH_ORDER_STREAM = 1, CU_BATCH_OVERLAP_COMPUTE = 1,
    CU_CAPTURE_RELAXED = 2,
};

struct cu_location { int type, id; };
struct cu_batch_attrs {
    int order;
    struct cu_location src, dst;
    unsigned flags;
};

struct fk_cuda {
    int version;                        /* of the driver: 13000 is 13.0 */
    cu_result (*Init)(unsigned);
    cu_result (*DriverGetVersion)(int *);
    cu_result (*GetErrorName)(cu_result, const char **);
    cu_result (*DeviceGet)(cu_device *, int);
    cu_result (*DeviceGetCount)(int *);
    cu_result (*DeviceGetUuid)(void *, cu_device);
    cu_result (*DeviceGetAttribute)(int *, int, cu_device);
    cu_result (*DevicePrimaryCtxRetain)(cu_context *, cu_device);
    cu_result (*DevicePrimaryCtxRelease)(cu_device);
    cu_result (*CtxSetCurrent)(cu_context);
    cu_result (*CtxGetStreamPriorityRange)(int *, int *);
    cu_result (*CtxSynchronize)(void);
    cu_result (*ModuleLoadData)(cu_module *, const void *);
    cu_result (*ModuleUnload)(cu_module);
    cu_result (*ModuleGetFunction)(cu_function *, cu_module, const char *);
    cu_result (*LaunchKernel)(cu_function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                              unsigned, cu_stream, void **, void **);
    cu_result (*StreamCreateWithPriority)(cu_stream *, unsigned, int);
    cu_result (*StreamDestroy)(cu_stream);
    cu_result (*StreamWaitEvent)(cu_stream, cu_event, unsigned);
    cu_result (*StreamSynchronize)(cu_stream);
    cu_result (*EventCreate)(cu_event *, unsigned);
    cu_result (*EventDestroy)(cu_event);
    cu_result (*EventRecord)(cu_event, cu_stream);
    cu_result (*EventQuery)(cu_event);
    cu_result (*MemAlloc)(cu_ptr *, size_t);
    cu_result (*MemFree)(cu_ptr);
    cu_result (*MemHostAlloc)(void **, size_t, unsigned);
    cu_result (*MemFreeHost)(void *);
    cu_result (*MemHostRegister)(void *, size_t, unsigned);
    cu_result (*MemHostUnregister)(void *);
    cu_result (*MemcpyHtoDAsync)(cu_ptr, const void *, size_t, cu_stream);
    cu_result (*MemcpyDtoHAsync)(void *, cu_ptr, size_t, cu_stream);
    cu_result (*MemcpyHtoD)(cu_ptr, const void *, size_t);
    cu_result (*MemcpyDtoH)(void *, cu_ptr, size_t);
    cu_result (*PointerGetAttributes)(unsigned, int *, void **, cu_ptr);
    cu_result (*ThreadExchangeStreamCaptureMode)(int *);
    /* Optional. */
    cu_result (*LaunchHostFunc)(cu_stream, void (*)(void *), void *);
    /* 12.8 with one argument more than 13.0; both NULL before 12.8. */
    cu_result (*MemcpyBatch128)(cu_ptr *, cu_ptr *, size_t *, size_t, struct cu_batch_attrs *,
                                size_t *, size_t, size_t *, cu_stream);
    cu_result (*MemcpyBatch130)(cu_ptr *, cu_ptr *, size_t *, size_t, struct cu_batch_attrs *,
                                size_t *, size_t, cu_stream);
};

/* NULL: there is no (usable) driver. load false: only if the process has it loaded already, as it
 * must have where an engine gave us device memory. Once found it stays. */
const struct fk_cuda *fk_cuda_driver(bool load);
const char *fk_cuda_error(const struct fk_cuda *cu, cu_result r);
static inline bool fk_cuda_has_batch(const struct fk_cuda *cu)
{
    return cu->MemcpyBatch130 || cu->MemcpyBatch128;
}
/* The device whose memory the address is in, -1: host memory, or none that the driver knows. */
int fk_cuda_device_of(const struct fk_cuda *cu, const void *address);

#endif
