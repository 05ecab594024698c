/*
 * test_direct.c - the probe of GPU direct storage, with a cuFile that is none (fake_cufile.c) and that
 * works, is not there, or lies in one way or another.
 */
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <unistd.h>

#include <cmocka.h>

#include "../device/fake_driver.h"
#include "base/log.h"
#include "copy/cuda/direct.h"

static const char *library;

static int probe_with(const char *how, int timeout_ms, char *why)
{
    char path[] = "flexkv-direct-XXXXXX";
    int fds[2];
    struct fk_direct_params p = { .cu = &fake_driver, .library = library, .fds = fds, .n_fds = 2,
                                  .timeout_ms = timeout_ms };

    setenv("FAKE_CUFILE", how, 1);
    for (int i = 0; i < 2; i++) {
        strcpy(path, "flexkv-direct-XXXXXX");
        int fd = mkstemp(path);
        assert_true(fd >= 0);
        close(fd);
        fds[i] = open(path, O_RDWR | O_DIRECT | O_CLOEXEC);
        if (fds[i] < 0)
            fds[i] = open(path, O_RDWR | O_CLOEXEC);
        assert_true(fds[i] >= 0);
        unlink(path);
    }
    why[0] = '\0';
    int rc = fk_direct_probe(&p, why, 300);
    for (int i = 0; i < 2; i++)
        close(fds[i]);
    return rc;
}

static void a_good_one_passes(void **state)
{
    char why[300];

    assert_int_equal(probe_with("good", 10000, why), 0);
    assert_string_equal(why, "");
}

static void others_do_not(void **state)
{
    static const struct { const char *how, *why; } cases[] = {
        { "flip", "WRONG BYTES: what cuFileRead" }, { "nothing", "WRONG BYTES: what cuFileRead" },
        { "offset", "WRONG BYTES: what cuFileRead" }, { "no-write", "WRONG BYTES: what cuFileWrite" },
        { "short", "cuFileRead gave" }, { "bounce", "compatibility mode" },
        { "forced", "force_compat_mode" }, { "no-nvfs", "nvidia-fs" },
        { "no-driver", "nvidia-fs" }, { "overlayfs", "file system" }, { "no-bar", "GPU memory" },
    };
    char why[300];

    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        assert_int_equal(probe_with(cases[i].how, 10000, why), -ENOTSUP);
        if (!strstr(why, cases[i].why))
            fail_msg("%s: \"%s\" does not say \"%s\"", cases[i].how, why, cases[i].why);
    }
}

static void one_that_hangs_is_left(void **state)
{
    char why[300];

    assert_int_equal(probe_with("hang", 50, why), -ETIMEDOUT);
    assert_non_null(strstr(why, "50 ms"));
    sleep(3);                           /* what it holds is freed when it goes on */
}

static void nothing_there(void **state)
{
    struct fk_direct_params p = { .cu = &fake_driver, .library = "libnowhere.so.9", .n_fds = 1,
                                  .fds = (int[]){ 0 }, .timeout_ms = 10000 };
    char why[300];

    assert_int_equal(fk_direct_probe(&p, why, sizeof(why)), -ENOTSUP);
    assert_non_null(strstr(why, "libnowhere.so.9"));
    p.n_fds = 0;
    assert_int_equal(fk_direct_probe(&p, why, sizeof(why)), -ENOTSUP);
    assert_non_null(strstr(why, "ssd_cache_gb"));
}

/* First: what is said to it about its mode stays. */
static void one_that_will_not_give_up_its_mode(void **state)
{
    char why[300];

    setenv("FAKE_CUFILE", "compat", 1);
    assert_int_equal(probe_with("compat", 10000, why), -ENOTSUP);
    assert_non_null(strstr(why, "allow_compat_mode"));
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(one_that_will_not_give_up_its_mode),
        cmocka_unit_test(a_good_one_passes),
        cmocka_unit_test(others_do_not),
        cmocka_unit_test(one_that_hangs_is_left),
        cmocka_unit_test(nothing_there),
    };

    library = argv[argc - 1];
    fk_log_set_level(FK_LOG_CRITICAL);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
