/*
 * gpu_gds.c - the probe of GPU direct storage on a real machine, with the real cuFile: what it says of
 * directories. Either answer is fine, but wrong bytes are not, nor a probe that does not end.
 *
 *   gpu_gds [--library FILE] [DEVICE [DIRECTORY...]]        (device 0, the current directory)
 */
#include <fcntl.h>
#include <unistd.h>

#include "copy/cuda/direct.h"
#include "gpu_rig.h"

static int file_in(const char *dir, const char **name)
{
    static char path[400];

    snprintf(path, sizeof(path), "%s/flexkv-gds-XXXXXX", dir);  /* with a name, as cuFile opens it again */
    int made = mkstemp(path), fd = open(path, O_RDWR | O_DIRECT | O_CLOEXEC);
    if (fd < 0)
        fd = open(path, O_RDWR | O_CLOEXEC);
    if (made < 0 || fd < 0)
        perror(dir);
    close(made);
    *name = path;
    return fd;
}

int main(int argc, char **argv)
{
    struct fk_direct_params p = { .timeout_ms = 60000, .n_fds = 1 };
    char why[400] = "";

    if (argc > 2 && strcmp(argv[1], "--library") == 0) {
        p.library = argv[2];
        argc -= 2;
        argv += 2;
    }
    int device = argc > 1 ? atoi(argv[1]) : 0, wrong = 0;
    rig_open_device(device);
    MUST(cu->DevicePrimaryCtxRetain(&p.context, device) == CU_OK);
    p.cu = cu;
    for (int i = 2; i < argc || i == 2; i++) {
        const char *dir = argc > 2 ? argv[i] : ".", *name;
        int fd = file_in(dir, &name);
        if (fd < 0)
            return 1;
        p.fds = &fd;
        uint64_t start = fk_clock_us();
        int rc = fk_direct_probe(&p, why, sizeof(why));
        printf("%s: %s%s (%llu ms)\n", dir, rc ? "not used: " : "GPU direct storage works", rc ? why : "",
               (unsigned long long)((fk_clock_us() - start) / 1000));
        wrong |= rc && (rc == -ETIMEDOUT || strstr(why, "WRONG"));
        close(fd);
        unlink(name);
    }
    return wrong;
}
