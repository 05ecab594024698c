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

static int file_in(const char *dir)
{
    int fd = open(dir, O_TMPFILE | O_RDWR | O_DIRECT | O_CLOEXEC, 0600);

    if (fd < 0)
        fd = open(dir, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    if (fd < 0)
        perror(dir);
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
        const char *dir = argc > 2 ? argv[i] : ".";
        int fd = file_in(dir);
        if (fd < 0)
            return 1;
        p.fds = &fd;
        uint64_t start = fk_clock_us();
        int rc = fk_direct_probe(&p, why, sizeof(why));
        printf("%s: %s%s (%llu ms)\n", dir, rc ? "not used: " : "GPU direct storage works", rc ? why : "",
               (unsigned long long)((fk_clock_us() - start) / 1000));
        wrong |= rc && (rc == -ETIMEDOUT || strstr(why, "WRONG"));
        close(fd);
    }
    return wrong;
}
