/* engine.c - chooses the engine: uring where the kernel grants it, else threads. */
#include "tier/engine.h"

#include <string.h>

#include "base/log.h"

int fk_engine_create(const struct fk_engine_params *params, struct fk_engine **out)
{
    if (!params->no_uring) {
        int rc = fk_engine_uring_create(params, out);

        if (rc == 0)
            return 0;
        fk_warn("io_uring refused (%s); SSD I/O goes through threads", strerror(-rc));
    }
    return fk_engine_threads_create(params, out);
}
