/* redis_rig.h - a real Redis for a test of the API, at a unix socket in a directory of its own. After api_rig.h. */
#ifndef FK_TESTS_REDIS_RIG_H
#define FK_TESTS_REDIS_RIG_H

#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>

static char redis_dir[80], redis_path[120];
static pid_t redis_pid;

static inline void start_redis(void)
{
    snprintf(redis_path, sizeof(redis_path), "%s/r.sock", redis_dir);
    redis_pid = fork();
    assert_true(redis_pid >= 0);
    if (!redis_pid) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        int null = open("/dev/null", O_RDWR);
        dup2(null, 1);
        dup2(null, 2);
        execlp("redis-server", "redis-server", "--port", "0", "--unixsocket", redis_path, "--save", "", "--dir",
               redis_dir, NULL);
        _exit(127);
    }
    for (int i = 0; i < 1000 && access(redis_path, F_OK); i++)
        usleep(10000);
    assert_int_equal(access(redis_path, F_OK), 0);
}

static inline void stop_redis(void)
{
    kill(redis_pid, SIGKILL);
    waitpid(redis_pid, NULL, 0);
    unlink(redis_path);
}

#endif
