/*
 * fuzz_layers.c - libFuzzer target: what an engine may send when it hands over its layers' eventfds.
 * Nothing may crash, no descriptor may leak or be closed twice, and nothing but eventfds be written to.
 *
 * Input: chunks, each [ bytes (1-16) | descriptors << 4, payload ]; descriptors: 0-14 eventfds, 15: one of
 * /dev/null among three.
 */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "api/layers.h"
#include "base/log.h"
#include "base/util.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define LAYERS 3u

static struct fk_layers *layers;
static int events[16], null_fd;

static void start(void)
{
    char address[64], error[200];

    fk_log_set_level(FK_LOG_OFF);
    snprintf(address, sizeof(address), "ipc://@flexkv-fuzz-layers-%d", (int)getpid());
    if (fk_layers_open(address, LAYERS, 0, &layers, error, sizeof(error)))
        abort();
    for (int i = 0; i < 16; i++)
        events[i] = eventfd(0, EFD_NONBLOCK | EFD_SEMAPHORE);
    null_fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
}

static void send_chunk(int s, const uint8_t *data, size_t bytes, unsigned descriptors)
{
    union { char buf[CMSG_SPACE(sizeof(int) * 16)]; struct cmsghdr align; } control = { 0 };
    struct iovec v = { (void *)(uintptr_t)data, bytes };
    struct msghdr m = { .msg_iov = &v, .msg_iovlen = 1 };
    int fds[16];

    memcpy(fds, events, sizeof(fds));
    if (descriptors == 15) {
        fds[1] = null_fd;
        descriptors = LAYERS;
    }
    if (descriptors) {
        m.msg_control = control.buf;
        m.msg_controllen = CMSG_SPACE(descriptors * sizeof(int));
        struct cmsghdr *c = CMSG_FIRSTHDR(&m);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(descriptors * sizeof(int));
        memcpy(CMSG_DATA(c), fds, descriptors * sizeof(int));
    }
    (void)!sendmsg(s, &m, MSG_NOSIGNAL | MSG_DONTWAIT);
}

static int open_files(void)
{
    int fd = dup(null_fd);              /* the lowest free number: it grows with every leak */

    close(fd);
    return fd;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static int most;
    int sv[2];

    if (!layers)
        start();
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sv) < 0)
        abort();
    while (size > 1) {
        size_t bytes = fk_min((size_t)(data[0] & 15) + 1, size - 1);
        send_chunk(sv[0], data + 1, bytes, data[0] >> 4);
        data += 1 + bytes;
        size -= 1 + bytes;
    }
    shutdown(sv[0], SHUT_WR);
    (void)fk_layers_receive(layers, sv[1]);
    for (uint32_t c = 0; c <= FK_LAYER_COUNTERS; c++)
        fk_layers_signal(layers, c, 0, LAYERS + 1);
    close(sv[0]);
    close(sv[1]);
    int now = open_files();
    if (most && now > most + (int)(FK_LAYER_COUNTERS * LAYERS))
        abort();
    most = most ? most : now;
    return 0;
}
