/* config_impl.h - private to src/api: what a flexkv_config is. A node keeps a reference to the
 * one it was opened with, which is frozen then. */
#ifndef FK_API_CONFIG_IMPL_H
#define FK_API_CONFIG_IMPL_H

#include <stdatomic.h>

#include "config/config.h"
#include "flexkv/flexkv.h"

struct flexkv_config {
    struct fk_config *config;
    _Atomic unsigned refs;
    bool finished;                  /* defaults applied, checks across options done */
    int broken;                     /* -errno of a source that could not be read: can't be opened */
    bool frozen;
};

/* Finishes and freezes; a reference more. */
int fk_api_config_take(flexkv_config *c);
/* What a node or client is opened with: the given one, or for NULL the usual one; finished, a
 * reference of the caller's own. */
int fk_api_config_open(const flexkv_config *given, flexkv_config **out);

#endif
