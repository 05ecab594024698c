/* pin.c - see pin.h. */
#include "copy/cuda/pin.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>

#include "base/log.h"
#include "base/util.h"

/* Registering stops other calls of the process into the driver, 0.07 s for each GiB: short
 * pieces, and room between them for the engine's launches. */
#define CHUNK_BYTES (64 * FK_MIB)       /* unless the options say otherwise */
#define PAUSE_US 2000
#define PAGE 4096ull
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#define MPOL_PREFERRED 1

enum chunk_state { CHUNK_TODO, CHUNK_BUSY, CHUNK_DONE, CHUNK_FAILED };

struct fk_pin {
    struct fk_pin_params p;
    uint64_t chunk_bytes;
    uint32_t n_chunks;
    _Atomic unsigned char *state;       /* enum chunk_state; changes under the lock */
    pthread_mutex_t lock;
    pthread_cond_t changed;
    pthread_t thread;
    bool has_thread, told;
    _Atomic bool stop;
    _Atomic uint64_t done_bytes;
};

static uint64_t chunk_size(const struct fk_pin *pin, uint32_t i)
{
    uint64_t start = i * pin->chunk_bytes;

    return fk_min(pin->chunk_bytes, pin->p.bytes - start);
}

/* Room for whole units, in whole pages of memory. */
static uint64_t chunk_bytes_for(uint64_t unit, uint64_t wanted)
{
    uint64_t step = unit;

    while (step % PAGE)
        step += unit;
    return fk_max((wanted ? wanted : CHUNK_BYTES) / step, 1ull) * step;
}

static enum chunk_state pin_chunk(struct fk_pin *pin, uint32_t i)
{
    char *at = pin->p.base + i * pin->chunk_bytes;
    uint64_t bytes = chunk_size(pin, i);
    cu_result r;

    (void)madvise(at, bytes, MADV_POPULATE_WRITE);      /* outside of the driver's lock */
    r = pin->p.cu->MemHostRegister(at, bytes, CU_HOST_REGISTER_PORTABLE | CU_HOST_REGISTER_DEVICE_MAP);
    if (r == CU_OK) {
        atomic_fetch_add(&pin->done_bytes, bytes);
        return CHUNK_DONE;
    }
    if (!pin->told)
        fk_warn("the cpu tier can't be page-locked for GPU %d (%s after %llu MiB): copies of the rest "
                "are slow; is the locked-memory limit (ulimit -l) too low?", pin->p.device,
                fk_cuda_error(pin->p.cu, r), (unsigned long long)(pin->done_bytes / FK_MIB));
    pin->told = true;
    return CHUNK_FAILED;
}

/* With the lock. Whoever finds a chunk untouched registers it; others wait. */
static enum chunk_state settle_chunk(struct fk_pin *pin, uint32_t i)
{
    while (pin->state[i] == CHUNK_BUSY)
        pthread_cond_wait(&pin->changed, &pin->lock);
    if (pin->state[i] == CHUNK_TODO) {
        pin->state[i] = CHUNK_BUSY;
        pthread_mutex_unlock(&pin->lock);
        enum chunk_state s = pin_chunk(pin, i);
        pthread_mutex_lock(&pin->lock);
        pin->state[i] = (unsigned char)s;
        pthread_cond_broadcast(&pin->changed);
    }
    return pin->state[i];
}

/* New pages of the pool come from the memory next to the device. */
static void prefer_near_memory(const struct fk_pin *pin)
{
    int node = -1;

    if (pin->p.cu->DeviceGetAttribute(&node, CU_DEVICE_NUMA_ID, pin->p.device) == CU_OK && node >= 0 &&
        node < 64)
        syscall(SYS_set_mempolicy, MPOL_PREFERRED, &(unsigned long){ 1ul << node }, 65);
}

static void *pin_main(void *arg)
{
    struct fk_pin *pin = arg;
    int relaxed = CU_CAPTURE_RELAXED;

    pin->p.cu->CtxSetCurrent(pin->p.context);
    pin->p.cu->ThreadExchangeStreamCaptureMode(&relaxed);
    prefer_near_memory(pin);
    for (uint32_t i = 0; i < pin->n_chunks && !atomic_load(&pin->stop); i++) {
        pthread_mutex_lock(&pin->lock);
        enum chunk_state s = settle_chunk(pin, i);
        pthread_mutex_unlock(&pin->lock);
        if (s == CHUNK_FAILED)
            break;                      /* the rest is tried when it is used */
        nanosleep(&(struct timespec){ .tv_nsec = PAUSE_US * 1000 }, NULL);
    }
    return NULL;
}

int fk_pin_open(const struct fk_pin_params *params, struct fk_pin **out)
{
    struct fk_pin *pin = calloc(1, sizeof(*pin));

    if (!pin)
        return -ENOMEM;
    pin->p = *params;
    pin->chunk_bytes = chunk_bytes_for(params->unit_bytes, params->chunk_bytes);
    pin->n_chunks = (uint32_t)fk_div_up(params->bytes, pin->chunk_bytes);
    pin->state = calloc(pin->n_chunks, 1);
    if (!pin->state) {
        free(pin);
        return -ENOMEM;
    }
    pthread_mutex_init(&pin->lock, NULL);
    pthread_cond_init(&pin->changed, NULL);
    pin->has_thread = pthread_create(&pin->thread, NULL, pin_main, pin) == 0;
    *out = pin;
    return 0;
}

void fk_pin_close(struct fk_pin *pin)
{
    if (!pin)
        return;
    atomic_store(&pin->stop, true);
    if (pin->has_thread)
        pthread_join(pin->thread, NULL);
    pin->p.cu->CtxSetCurrent(pin->p.context);
    for (uint32_t i = 0; i < pin->n_chunks; i++)
        if (pin->state[i] == CHUNK_DONE)
            pin->p.cu->MemHostUnregister(pin->p.base + i * pin->chunk_bytes);
    pthread_mutex_destroy(&pin->lock);
    pthread_cond_destroy(&pin->changed);
    free((void *)pin->state);
    free(pin);
}

bool fk_pin_ensure(struct fk_pin *pin, const char *at, uint64_t bytes)
{
    uint64_t from = (uint64_t)(at - pin->p.base);
    bool ok = true;

    for (uint32_t i = (uint32_t)(from / pin->chunk_bytes);
         i <= (from + bytes - 1) / pin->chunk_bytes; i++) {
        if (fk_likely(atomic_load_explicit(&pin->state[i], memory_order_acquire) == CHUNK_DONE))
            continue;
        pthread_mutex_lock(&pin->lock);
        ok &= settle_chunk(pin, i) == CHUNK_DONE;
        pthread_mutex_unlock(&pin->lock);
    }
    return ok;
}

uint64_t fk_pin_run(const struct fk_pin *pin, const char *at)
{
    return pin->chunk_bytes - (uint64_t)(at - pin->p.base) % pin->chunk_bytes;
}
