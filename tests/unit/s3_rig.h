/*
 * s3_rig.h - an S3 server that is not ours (tests/store/s3.py, in the environment of tools/s3-env) for the tests of blocks
 * kept as objects: FLEXKV_TEST_S3 names that environment's python, FLEXKV_TEST_NIXL the folder of NIXL's C library, and the
 * tests run in the project's folder. It dies with the test.
 */
#ifndef FK_TESTS_S3_RIG_H
#define FK_TESTS_S3_RIG_H

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

static struct { pid_t pid; int port; char endpoint[40]; } s3;

static inline bool s3_wanted(void)
{
    return getenv("FLEXKV_TEST_S3") && *getenv("FLEXKV_TEST_S3");
}

static inline void s3_start(void)
{
    char line[32] = "";
    int said[2];

    assert_int_equal(pipe(said), 0);
    s3.pid = fork();
    if (!s3.pid) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        dup2(said[1], 1);
        if (!freopen("/dev/null", "w", stderr))
            _exit(2);
        const char *python = getenv("FLEXKV_TEST_S3");      /* by its first argument it finds its environment */
        execl(python, python, "tests/store/s3.py", "serve", NULL);
        _exit(2);
    }
    close(said[1]);
    FILE *f = fdopen(said[0], "r");
    if (!f || !fgets(line, sizeof(line), f) || (s3.port = atoi(line)) <= 0)
        fail_msg("the S3 server does not start");
    fclose(f);
    snprintf(s3.endpoint, sizeof(s3.endpoint), "http://127.0.0.1:%d", s3.port);
    setenv("AWS_ACCESS_KEY_ID", "test", 1);
    setenv("AWS_SECRET_ACCESS_KEY", "test", 1);
}

static inline void s3_stop(void)
{
    if (s3.pid <= 0)
        return;
    kill(s3.pid, SIGKILL);
    waitpid(s3.pid, NULL, 0);
    s3.pid = 0;
}

/* What s3.py does. */
static inline int s3_do(const char *what, const char *prefix, int n)
{
    char command[400];

    snprintf(command, sizeof(command), "%.200s tests/store/s3.py %s %d %s %d", getenv("FLEXKV_TEST_S3"), what, s3.port, prefix,
             n);
    return system(command);
}

#endif
