/* cufile.c - see cufile.h. */
#include "copy/cuda/cufile.h"

#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/util.h"

enum {
    CF_CONTROL_COMPAT = 1 << 1, CF_CONTROL_POSIX = 1 << 2, CF_CONTROL_FALLBACK = 1 << 4,
    CF_FEATURE_P2P = 1 << 4,
    CF_PARAM_ALLOW_COMPAT = 1, CF_PARAM_FORCE_COMPAT = 2,
};

struct reason { char *text; size_t bytes; };

__attribute__((format(printf, 2, 3)))
static int refuse(struct reason why, const char *format, ...)
{
    va_list args;

    va_start(args, format);
    vsnprintf(why.text, why.bytes, format, args);
    va_end(args);
    return -ENOTSUP;
}

bool fk_cufile_through_cpu(void)
{
    const char *on = getenv("FKTEST_GDS_THROUGH_CPU");

    return on && !strcmp(on, "1");
}

int fk_cufile_load(const char *library, struct fk_cufile *cf, char *text, size_t bytes)
{
    static const struct { const char *name; size_t at; bool optional; } symbols[] = {
        { "cuFileDriverOpen", offsetof(struct fk_cufile, DriverOpen), false },
        { "cuFileDriverGetProperties", offsetof(struct fk_cufile, DriverGetProperties), false },
        { "cuFileHandleRegister", offsetof(struct fk_cufile, HandleRegister), false },
        { "cuFileHandleDeregister", offsetof(struct fk_cufile, HandleDeregister), false },
        { "cuFileBufRegister", offsetof(struct fk_cufile, BufRegister), false },
        { "cuFileBufDeregister", offsetof(struct fk_cufile, BufDeregister), false },
        { "cuFileRead", offsetof(struct fk_cufile, Read), false },
        { "cuFileWrite", offsetof(struct fk_cufile, Write), false },
        { "cuFileSetParameterBool", offsetof(struct fk_cufile, SetParameterBool), true },
        { "cuFileGetParameterBool", offsetof(struct fk_cufile, GetParameterBool), true },
    };
    struct reason why = { text, bytes };
    void *loaded = dlopen(library ? library : FK_CUFILE_LIBRARY, RTLD_NOW | RTLD_LOCAL);

    if (!loaded)
        return refuse(why, "%s can't be loaded: %s", library ? library : FK_CUFILE_LIBRARY, dlerror());
    for (size_t i = 0; i < fk_array_size(symbols); i++) {
        void *s = dlsym(loaded, symbols[i].name);
        if (!s && !symbols[i].optional)
            return refuse(why, "%s has no %s", library ? library : FK_CUFILE_LIBRARY, symbols[i].name);
        memcpy((char *)cf + symbols[i].at, &s, sizeof(s));
    }
    return 0;
}

static int no_fallback(const struct fk_cufile *cf, struct reason why)
{
    struct cf_props props = { 0 };
    bool forced = false, allowed = true;
    struct cf_error e = cf->DriverGetProperties(&props);

    if (e.err)
        return refuse(why, "cuFile does not say what it can do (error %d)", e.err);
    if (cf->GetParameterBool && !cf->GetParameterBool(CF_PARAM_ALLOW_COMPAT, &allowed).err)
        props.nvfs.control = (props.nvfs.control & ~(unsigned)CF_CONTROL_COMPAT) |
                             (allowed ? CF_CONTROL_COMPAT : 0);
    if (cf->GetParameterBool)
        (void)cf->GetParameterBool(CF_PARAM_FORCE_COMPAT, &forced);
    if (forced)
        return refuse(why, "cuFile is told to copy through the CPU (force_compat_mode in cufile.json)");
    if (props.nvfs.control & (CF_CONTROL_COMPAT | CF_CONTROL_POSIX | CF_CONTROL_FALLBACK))
        return refuse(why, "cuFile may copy through the CPU and not say so (compatibility mode): set "
                      "properties.allow_compat_mode to false in cufile.json");
    if (!props.nvfs.major && !(props.features & CF_FEATURE_P2P))
        return refuse(why, "neither the nvidia-fs driver nor PCI peer-to-peer is there: cuFile could only "
                      "copy through the CPU (compatibility mode)");
    return 0;
}

int fk_cufile_open(const struct fk_cufile *cf, char *text, size_t bytes)
{
    struct reason why = { text, bytes };
    bool through_cpu = fk_cufile_through_cpu();

    if (cf->SetParameterBool)           /* refused when it is open already */
        (void)cf->SetParameterBool(CF_PARAM_ALLOW_COMPAT, through_cpu);
    if (cf->SetParameterBool && through_cpu)
        (void)cf->SetParameterBool(CF_PARAM_FORCE_COMPAT, true);
    struct cf_error e = cf->DriverOpen();
    if (e.err)
        return refuse(why, "cuFile does not start (error %d%s)", e.err,
                      e.err == 5001 ? ": the nvidia-fs driver is not loaded" : "");
    return through_cpu ? 0 : no_fallback(cf, why);
}
