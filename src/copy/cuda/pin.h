/*
 * pin.h - page-locking a mapped pool for a device, chunk by chunk: in order, in the background, and
 * ahead of that whatever a copy is about to touch. Each chunk is registered once by this
 * process and unregistered once, when the pin is closed.
 *
 * Callers: the cuda copier; any thread.
 */
#ifndef FK_COPY_CUDA_PIN_H
#define FK_COPY_CUDA_PIN_H

#include "copy/cuda/driver.h"

struct fk_pin;

struct fk_pin_params {
    const struct fk_cuda *cu;
    cu_context context;
    int device;
    char *base;
    uint64_t bytes, unit_bytes;     /* a unit (slot) never lies in two chunks */
    uint64_t chunk_bytes;           /* about; 0: 64 MiB */
};

int fk_pin_open(const struct fk_pin_params *params, struct fk_pin **out);
/* Nothing may use the memory any more. */
void fk_pin_close(struct fk_pin *pin);
/* Waits until the bytes are registered. false: they could not be (logged once). */
bool fk_pin_ensure(struct fk_pin *pin, const char *at, uint64_t bytes);
/* Bytes from the address that one copy may touch: a registration ends there, at the latest. */
uint64_t fk_pin_run(const struct fk_pin *pin, const char *at);

#endif
