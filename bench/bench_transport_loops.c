/* bench_transport_loops.c - a bare socket loop, and Mooncake's engine from Python. See bench_transport.h. */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/util.h"
#include "bench_transport.h"

struct ask { uint64_t offset, bytes; };

/* ---- a socket: requests down, bytes up ---- */

static void serve(int listener)
{
    char *pool = calloc(1, BENCH_POOL_BYTES);
    struct ask a;
    int one = 1, fd = accept(listener, NULL, NULL);

    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
    memset(pool, 1, BENCH_POOL_BYTES);
    while (recv(fd, &a, sizeof(a), MSG_WAITALL) == sizeof(a))
        for (uint64_t at = 0; at < a.bytes;) {
            ssize_t n = send(fd, pool + a.offset + at, a.bytes - at, MSG_NOSIGNAL);
            if (n <= 0)
                _exit(0);
            at += (uint64_t)n;
        }
    _exit(0);
}

struct socket_loop { int fd; char *pool; uint64_t rng; };

static int send_ask(struct socket_loop *s, uint32_t bytes)
{
    struct ask a = { (uint64_t)fk_rng_below(&s->rng, (uint32_t)(BENCH_POOL_BYTES / bytes)) * bytes, bytes };

    return send(s->fd, &a, sizeof(a), MSG_NOSIGNAL) == sizeof(a) ? 0 : -EIO;
}

static double socket_run(struct bench_loop *l, uint32_t bytes, uint64_t run_us)
{
    struct socket_loop *s = l->priv;
    uint64_t start = fk_clock_us(), now = start, done = 0, to = 0;
    unsigned in_flight = 0;

    for (; in_flight < BENCH_DEPTH; in_flight++)
        if (send_ask(s, bytes))
            return -EIO;
    while (in_flight) {
        if (recv(s->fd, s->pool + to, bytes, MSG_WAITALL) != (ssize_t)bytes)
            return -EIO;
        to = (to + bytes) % BENCH_POOL_BYTES;
        done += bytes;
        now = fk_clock_us();
        if (now - start < run_us ? send_ask(s, bytes) != 0 : (in_flight--, false))
            return -EIO;
    }
    return (double)done * 1e6 / (double)(now - start);
}

int bench_socket_open(struct bench_loop *l)
{
    struct sockaddr_in a = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    socklen_t len = sizeof(a);
    int one = 1, listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct socket_loop *s = calloc(1, sizeof(*s));

    if (listener < 0 || !s || bind(listener, (struct sockaddr *)&a, len) || listen(listener, 1) ||
        getsockname(listener, (struct sockaddr *)&a, &len))
        return -errno;
    if (fork() == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        serve(listener);
    }
    close(listener);
    s->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    s->pool = calloc(1, BENCH_POOL_BYTES);
    if (!s->pool || connect(s->fd, (struct sockaddr *)&a, len))
        return -errno;
    memset(s->pool, 1, BENCH_POOL_BYTES);
    setsockopt(s->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
    *l = (struct bench_loop){ socket_run, s };
    return 0;
}

/* ---- Mooncake's engine ---- */

/* Two engines in two processes; the reader's is told sizes and times over its stdin. */
static const char script[] =
    "import os, sys, ctypes, random, time, subprocess\n"
    "os.environ['MC_TCP_BIND_ADDRESS'] = '127.0.0.1'\n"
    "os.environ['MC_LOG_LEVEL'] = 'ERROR'\n"
    "POOL, N = 64 << 20, 64\n"
    "def engine():\n"
    "    from mooncake.engine import TransferEngine\n"
    "    e = TransferEngine()\n"
    "    assert e.initialize('127.0.0.1:0', 'P2PHANDSHAKE', 'tcp', '') == 0\n"
    "    m = ctypes.create_string_buffer(POOL)\n"
    "    ctypes.memset(m, 1, POOL)\n"
    "    assert e.register_memory(ctypes.addressof(m), POOL) == 0\n"
    "    return e, m, ctypes.addressof(m)\n"
    "if sys.argv[1] == 'target':\n"
    "    e, m, base = engine()\n"
    "    print('@', e.get_rpc_port(), base, flush=True)\n"
    "    sys.stdin.read()\n"
    "    os._exit(0)\n"
    "t = subprocess.Popen([sys.executable, '-c', os.environ['SCRIPT'], 'target'], stdin=subprocess.PIPE,\n"
    "                     stdout=subprocess.PIPE, text=True)\n"
    "line = ''\n"
    "while not line.startswith('@'):\n"
    "    line = t.stdout.readline()\n"
    "    assert line\n"
    "_, port, there = line.split()\n"
    "e, m, base = engine()\n"
    "print('@ ready', flush=True)\n"
    "for line in sys.stdin:\n"
    "    size, run = (int(x) for x in line.split())\n"
    "    slots, done, start, at = POOL // size, 0, time.monotonic(), 0\n"
    "    while time.monotonic() - start < run / 1e6:\n"
    "        here = [base + (at + i) % slots * size for i in range(N)]\n"
    "        at += N\n"
    "        far = [int(there) + random.randrange(slots) * size for i in range(N)]\n"
    "        assert e.batch_transfer_sync_read('127.0.0.1:' + port, here, far, [size] * N) == 0\n"
    "        done += N * size\n"
    "    print('@', done / (time.monotonic() - start), flush=True)\n"
    "os._exit(0)\n";

struct mooncake_loop { FILE *to, *from; };

static int said(struct mooncake_loop *m, char *line, size_t bytes)
{
    while (fgets(line, (int)bytes, m->from))    /* the library writes lines of its own */
        if (line[0] == '@')
            return 0;
    return -EIO;
}

static double mooncake_run(struct bench_loop *l, uint32_t bytes, uint64_t run_us)
{
    struct mooncake_loop *m = l->priv;
    char line[256];

    fprintf(m->to, "%u %llu\n", bytes, (unsigned long long)run_us);
    fflush(m->to);
    return said(m, line, sizeof(line)) ? -EIO : atof(line + 1);
}

int bench_mooncake_open(struct bench_loop *l)
{
    const char *python = getenv("FLEXKV_MOONCAKE_PYTHON");
    int down[2], up[2];
    char line[256];
    struct mooncake_loop *m = calloc(1, sizeof(*m));

    if (!python || !*python || !m)
        return -ENOENT;
    if (pipe(down) || pipe(up))
        return -errno;
    if (fork() == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        dup2(down[0], 0);
        dup2(up[1], 1);
        for (int fd = 3; fd < 256; fd++)
            close(fd);
        setenv("SCRIPT", script, 1);
        execlp(python, python, "-c", script, "reader", (char *)NULL);
        _exit(127);
    }
    close(down[0]);
    close(up[1]);
    m->to = fdopen(down[1], "w");
    m->from = fdopen(up[0], "r");
    *l = (struct bench_loop){ mooncake_run, m };
    return said(m, line, sizeof(line));
}
