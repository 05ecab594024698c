/*
 * test_remote.c - nodes with a place that they share (enable_3rd_remote), through the public API: what one put
 * another gets, every byte checked; namespaces, KV events, resets, write policies; files that are wrong, stores that are
 * full, fail or hang; and together with peers, over a real Redis. A directory; with FLEXKV_TEST_S3 a bucket of a real
 * server, through NIXL (s3_rig.h).
 */
#include <ftw.h>
#include <sys/mount.h>

#include "api_rig.h"
#include "events_rig.h"
#include "redis_rig.h"
#include "s3_rig.h"

static char dir[80];

static const char *if_s3(const char *text, const char *otherwise) { return s3_wanted() ? text : otherwise; }
static const char *prefix(void) { return strrchr(dir, '/') + 1; }
static const char *nixl(void) { return getenv("FLEXKV_TEST_NIXL") ? getenv("FLEXKV_TEST_NIXL") : ""; }

#define STORE "enable_3rd_remote", "1", "remote_backend", if_s3("nixl", "directory"), "remote_cache_dir", dir, \
    "remote_bucket", "flexkv-test", "remote_endpoint", s3.endpoint, "remote_prefix", prefix(), "nixl_library", nixl(), \
    "remote_scan_ms", if_s3("50", "20"), "remote_retry_ms", "50", \
    "remote_timeout_ms", if_s3("10000", "5000")

static int remove_one(const char *path, const struct stat *st, int kind, struct FTW *ftw)
{
    return remove(path);
}

static int make_store(void **state)
{
    const char *tmp = getenv("TMPDIR");

    snprintf(dir, sizeof(dir), "%.50s/flexkv-remote-XXXXXX", tmp ? tmp : "/tmp");
    return mkdtemp(dir) ? 0 : -1;
}

static int remove_store(void **state)
{
    if (s3.pid > 0)
        kill(s3.pid, SIGCONT);
    umount2(dir, MNT_DETACH);           /* of a test that failed */
    nftw(dir, remove_one, 8, FTW_DEPTH | FTW_PHYS);
    return 0;
}

static uint64_t status_number(struct api *a, const char *name)
{
    char *json = NULL, want[60];

    assert_int_equal(flexkv_node_status(a->node, &json), 0);
    snprintf(want, sizeof(want), "\"%s\": ", name);
    char *store = strstr(json, "\"store\": {"), *at = store ? strstr(store, want) : NULL;
    if (!at)
        fail_msg("no %s in %s", want, json);
    uint64_t n = strncmp(at + strlen(want), "true", 4) == 0 ? 1 : strtoull(at + strlen(want), NULL, 10);
    free(json);
    return n;
}

#define wait_until(condition) do { \
        uint64_t until_ = fk_clock_us() + 20000000; \
        while (!(condition) && fk_clock_us() < until_) \
            usleep(2000); \
        assert_true(condition); \
    } while (0)

static bool reaches(struct api *a, uint32_t chain, uint32_t n)
{
    uint64_t deadline = fk_clock_us() + 20000000;

    while (matched(a, chain, n) < n && fk_clock_us() < deadline)
        usleep(2000);
    return matched(a, chain, n) == n;
}

static void wait_stored(struct api *a, uint64_t blocks)
{
    wait_until(status_number(a, "written_blocks") >= blocks);
}

/* ---- the good case ---- */

static void what_one_put_another_gets(void **state)
{
    struct api a = { 0 }, b = { 0 };

    open_node(&a, MORE(STORE));
    for (uint32_t c = 0; c < 4; c++)
        assert_int_equal(put_chain(&a, c, 12).blocks_ok, 12);
    close_node(&a);                     /* which waits until all is written */

    open_node(&b, MORE(STORE));
    for (uint32_t c = 0; c < 4; c++) {
        assert_true(reaches(&b, c, 12));
        flexkv_match_result m = match_chain(&b, c, 20);
        assert_int_equal(m.blocks, 12);
        assert_int_equal(m.peer_blocks, 12);
        assert_int_equal(flexkv_release(b.node, m.lease), 0);
        assert_int_equal(get_and_check(&b, c, 20), 12);
        assert_int_equal(match_chain(&b, c, 12).cpu_blocks, 12);    /* it is here now */
    }
    assert_int_equal(status_number(&b, "read_blocks"), 48);
    assert_int_equal(status_number(&b, "written_blocks"), 0);       /* what came from there is not written again */
    assert_true(stats_of(b.node).peer.bytes_read >= 48 * RANKS * SLICE_BYTES);
    close_node(&b);
}

static void others_are_seen_while_both_run(void **state)
{
    struct api a = { 0 }, b = { 0 };

    open_node(&a, MORE(STORE));
    open_node(&b, MORE(STORE));
    for (uint32_t round = 0; round < 5; round++) {
        assert_int_equal(put_chain(&a, round, 6).blocks_ok, 6);
        assert_true(reaches(&b, round, 6));
        assert_int_equal(get_and_check(&b, round, 6), 6);
        assert_int_equal(put_chain(&b, round, 10).blocks_ok, 10);   /* goes on where the other ended */
        assert_true(reaches(&a, round, 10));
        assert_int_equal(get_and_check(&a, round, 10), 10);
    }
    close_node(&a);
    close_node(&b);
}

/* More than memory holds: the store is a tier for the node itself. */
static void what_left_memory_comes_back(void **state)
{
    struct api a = { 0 };

    open_node(&a, MORE(STORE, "cpu_cache_blocks", "24"));
    for (uint32_t c = 0; c < 10; c++) {
        assert_int_equal(put_chain(&a, c, 8).blocks_ok, 8);
        wait_stored(&a, (c + 1) * 8);
    }
    for (uint32_t c = 0; c < 10; c++)
        assert_int_equal(get_and_check(&a, c, 8), 8);
    assert_true(status_number(&a, "read_blocks") >= 56);
    close_node(&a);
}

static void a_prefetch_brings_them(void **state)
{
    struct api a = { 0 }, b = { 0 };
    flexkv_key keys[MAX_CHAIN];
    flexkv_op_args args = { .struct_bytes = sizeof(args) };
    uint64_t op;

    open_node(&a, MORE(STORE));
    put_chain(&a, 3, 16);
    close_node(&a);
    open_node(&b, MORE(STORE));
    assert_true(reaches(&b, 3, 16));
    chain_of(&b, 3, keys, 16);
    assert_int_equal(flexkv_prefetch(b.ns, keys, 16, &args, &op), 0);
    assert_int_equal(wait_for(&b, op).blocks_ok, 16);
    flexkv_match_result m = match_chain(&b, 3, 16);
    assert_int_equal(m.cpu_blocks, 16);
    flexkv_release(b.node, m.lease);
    assert_int_equal(get_and_check(&b, 3, 16), 16);
    close_node(&b);
}

static void namespaces_are_apart(void **state)
{
    struct api a = { 0 }, b = { 0 };
    const char *tenant = "tenant", *secret = "secret";

    open_node(&a, MORE(STORE, "namespaces", "secret:shared=no"));
    assert_int_equal(flexkv_namespace_open(a.space, &secret, 1, &a.ns), 0);
    assert_int_equal(put_chain(&a, 1, 8).blocks_ok, 8);
    assert_int_equal(flexkv_namespace_open(a.space, &tenant, 1, &a.ns), 0);
    assert_int_equal(put_chain(&a, 1, 6).blocks_ok, 6);
    close_node(&a);

    open_node(&b, MORE(STORE));
    flexkv_namespace *plain = b.ns;
    assert_int_equal(flexkv_namespace_open(b.space, &tenant, 1, &b.ns), 0);
    assert_true(reaches(&b, 1, 6));
    assert_int_equal(get_and_check(&b, 1, 10), 6);
    assert_int_equal(status_number(&b, "blocks"), 6);       /* the secret one's are not there at all */
    b.ns = plain;
    assert_int_equal(matched(&b, 1, 8), 0);
    close_node(&b);
}

static void kv_events_tell_of_them(void **state)
{
    static struct router r;
    struct api a = { 0 }, b = { 0 };
    const char *name = "n";
    flexkv_events *ev;

    open_node(&a, MORE(STORE, "enable_kv_events", "1"));
    assert_int_equal(flexkv_namespace_open(a.space, &name, 1, &a.ns), 0);
    assert_int_equal(flexkv_namespace_label(a.ns, "lora-1", "salt-1"), 0);
    assert_int_equal(put_named(&a, 5, 9).blocks_ok, 9);
    close_node(&a);
    r = (struct router){ 0 };
    open_node(&b, MORE(STORE, "enable_kv_events", "1"));
    assert_int_equal(flexkv_namespace_open(b.space, &name, 1, &b.ns), 0);
    assert_int_equal(flexkv_events_open(b.node, NULL, &ev), 0);
    assert_true(reaches(&b, 5, 9));
    assert_int_equal(router_take(&r, ev, 64), 0);           /* what others could give is not told */
    assert_int_equal(get_and_check(&b, 5, 9), 9);
    assert_int_equal(router_take(&r, ev, 64), 9);
    assert_int_equal(router_count(&r, 5, FLEXKV_MEDIUM_CPU), 9);
    assert_string_equal(r.block[3].lora, "lora-1");
    assert_string_equal(r.block[3].salt, "salt-1");
    assert_int_equal(flexkv_reset(b.node), 0);
    router_take(&r, ev, 64);
    assert_int_equal(r.n, 0);
    flexkv_events_close(ev);
    close_node(&b);
}

static void only_what_is_used_again(void **state)
{
    struct api a = { 0 };

    open_node(&a, MORE(STORE, "remote_write_policy", "on_reuse"));
    assert_int_equal(put_chain(&a, 1, 8).blocks_ok, 8);
    assert_int_equal(put_chain(&a, 2, 8).blocks_ok, 8);
    assert_int_equal(get_and_check(&a, 2, 5), 5);
    wait_stored(&a, 5);
    usleep(100000);
    assert_int_equal(status_number(&a, "written_blocks"), 5);
    close_node(&a);
}

static void a_reset_forgets_them(void **state)
{
    struct api a = { 0 }, b = { 0 };

    open_node(&a, MORE(STORE));
    open_node(&b, MORE(STORE));
    put_chain(&a, 1, 8);
    assert_true(reaches(&b, 1, 8));
    assert_int_equal(flexkv_reset(a.node), 0);
    assert_int_equal(matched(&a, 1, 8), 0);
    if (!s3_wanted())                   /* where others go on until their next look */
        assert_int_equal(get_and_check(&b, 1, 8), 0);   /* known perhaps, but gone */
    wait_until(matched(&b, 1, 8) == 0);
    put_chain(&a, 2, 8);                /* and it goes on */
    assert_true(reaches(&b, 2, 8));
    assert_int_equal(get_and_check(&b, 2, 8), 8);
    close_node(&a);
    close_node(&b);
    open_node(&b, MORE(STORE));
    assert_true(reaches(&b, 2, 8));
    assert_int_equal(matched(&b, 1, 8), 0);
    close_node(&b);
}

/* ---- what is not good ---- */

static int n_spoiled;

static int spoil_one(const char *path, const struct stat *st, int kind, struct FTW *ftw)
{
    if (kind != FTW_F || strlen(path + ftw->base) != 32 || n_spoiled >= 3)
        return 0;
    int fd = open(path, O_RDWR);
    unsigned char c;
    if (fd < 0 || pread(fd, &c, 1, 5000) != 1)
        return -1;
    c ^= 1;
    n_spoiled++;
    int rc = pwrite(fd, &c, 1, 5000) == 1 ? 0 : -1;
    close(fd);
    return rc;
}

static void wrong_bytes_are_not_delivered(void **state)
{
    struct api a = { 0 }, b = { 0 };

    open_node(&a, MORE(STORE));
    put_chain(&a, 1, 40);
    close_node(&a);
    n_spoiled = 0;
    if (s3_wanted()) {
        assert_int_equal(s3_do("spoil", prefix(), 3), 0);
    } else {
        assert_int_equal(nftw(dir, spoil_one, 8, FTW_PHYS), 0);
        assert_int_equal(n_spoiled, 3);
    }
    open_node(&b, MORE(STORE));
    assert_true(reaches(&b, 1, 40));
    uint32_t got = get_and_check(&b, 1, 40);        /* which compares what it gets */
    assert_true(got < 40);
    for (int i = 0; i < 4; i++)
        assert_true(get_and_check(&b, 1, 40) < 40);
    assert_true(status_number(&b, "bad") >= 1);
    assert_true(put_chain(&b, 1, 40).blocks_ok >= 1);       /* computed again, and written again */
    close_node(&b);
    open_node(&b, MORE(STORE));
    assert_true(reaches(&b, 1, 40));
    assert_int_equal(get_and_check(&b, 1, 40), 40);
    close_node(&b);
}

static void settings_that_cannot_be(void **state)
{
    flexkv_node *node = NULL;

    assert_int_equal(try_open(MORE("enable_3rd_remote", "1"), &node), -EINVAL);
    assert_non_null(strstr(flexkv_last_error(), "remote_cache_dir"));
    assert_true(try_open(MORE("enable_3rd_remote", "1", "remote_cache_dir", "/proc/none/x"), &node) < 0);
    assert_non_null(strstr(flexkv_last_error(), "remote_cache_dir /proc/none/x"));
}

#define refused(status, text, ...) do { \
        assert_int_equal(try_open(MORE(STORE, __VA_ARGS__), &node), (status)); \
        if (!strstr(flexkv_last_error(), (text))) \
            fail_msg("no \"%s\" in \"%s\"", (text), flexkv_last_error()); \
    } while (0)

static void buckets_that_cannot_be(void **state)
{
    flexkv_node *node = NULL;

    refused(-EINVAL, "remote_bucket is not given", "remote_backend", "nixl", "remote_bucket", "");
    refused(-EINVAL, "remote_cache_gb can't be kept", "remote_backend", "nixl", "remote_cache_gb", "5");
    refused(-EINVAL, "remote_prefix /x", "remote_backend", "nixl", "remote_prefix", "/x");
    if (!s3_wanted()) {
        refused(-ENOSYS, "nixl_library", "remote_backend", "nixl", "nixl_library", "/no/such/folder");
        return;
    }
    refused(-ENODEV, "plugin NOTHING", "remote_nixl_plugin", "NOTHING");
    refused(-EIO, "remote_bucket no-such-bucket at http://127.0.0.1", "remote_bucket", "no-such-bucket");
    assert_true(try_open(MORE(STORE, "remote_endpoint", "http://127.0.0.1:1", "remote_timeout_ms", "700"), &node) < 0);
    assert_non_null(strstr(flexkv_last_error(), "remote_endpoint"));
}

static void a_full_store_is_read(void **state)
{
    struct api a = { 0 }, b = { 0 };

    if (s3_wanted() || mount("none", dir, "tmpfs", 0, "size=400k"))
        skip();
    open_node(&a, MORE(STORE));
    for (uint32_t c = 0; c < 7; c++)
        assert_int_equal(put_chain(&a, c, 8).blocks_ok, 8);
    wait_until(status_number(&a, "full") > 0);
    assert_int_equal(status_number(&a, "writes"), 0);
    for (uint32_t c = 0; c < 7; c++)
        assert_int_equal(get_and_check(&a, c, 8), 8);
    close_node(&a);
    open_node(&b, MORE(STORE));
    assert_true(reaches(&b, 0, 8));
    assert_int_equal(get_and_check(&b, 0, 8), 8);
    close_node(&b);
    umount2(dir, MNT_DETACH);
}

static int mount_dead_fuse(void)
{
    char options[80];
    int fd = open("/dev/fuse", O_RDWR | O_CLOEXEC);

    snprintf(options, sizeof(options), "fd=%d,rootmode=40000,user_id=%u,group_id=%u", fd, getuid(), getgid());
    if (fd >= 0 && mount("dead", dir, "fuse", MS_NODEV | MS_NOSUID, options) == 0)
        return fd;
    if (fd >= 0)
        close(fd);
    return -1;
}

/* From now on nobody answers. < 0: that can't be had here. */
static int hang(void)
{
    return s3_wanted() ? kill(s3.pid, SIGSTOP) : mount_dead_fuse();
}

static void hang_no_more(int fuse)
{
    if (s3_wanted()) {
        kill(s3.pid, SIGCONT);
        return;
    }
    assert_int_equal(umount2(dir, MNT_DETACH), 0);
    close(fuse);
}

/* It hangs for good: operations end, memory serves on, the node closes. */
static void a_hung_store_hangs_nobody(void **state)
{
    struct api a = { 0 }, b = { 0 };

    open_node(&a, MORE(STORE));
    put_chain(&a, 1, 8);
    close_node(&a);
    open_node(&b, MORE(STORE, "remote_timeout_ms", if_s3("4000", "300"), "remote_threads", "2"));
    assert_true(reaches(&b, 1, 8));
    assert_int_equal(put_chain(&b, 2, 8).blocks_ok, 8);
    wait_stored(&b, 8);
    int fuse = hang();
    if (fuse < 0) {
        close_node(&b);
        skip();
    }
    assert_int_equal(get_and_check(&b, 1, 8), 0);
    for (uint32_t c = 3; c < 6; c++) {
        assert_int_equal(put_chain(&b, c, 8).blocks_ok, 8);
        assert_int_equal(get_and_check(&b, c, 8), 8);
    }
    assert_int_equal(get_and_check(&b, 2, 8), 8);
    wait_until(!status_number(&b, "reads"));
    assert_int_equal(matched(&b, 1, 8), 0);
    if (!s3_wanted())                   /* whose bytes go through other buffers */
        assert_true(status_number(&b, "quarantined") > 0);
    assert_int_equal(flexkv_reset(b.node), -ETIMEDOUT);
    assert_non_null(strstr(flexkv_last_error(), if_s3("remote_bucket", "remote_cache_dir")));
    flexkv_node *node = NULL;
    assert_int_equal(try_open(MORE(STORE, "remote_timeout_ms", "100"), &node), -ETIMEDOUT);
    close_node(&b);                     /* the slots that it still may write to are left behind */
    hang_no_more(fuse);
    usleep(300000);                     /* those who hung come back, and find nobody */
}

/* Nobody has closed it. (Of a directory nothing is taken down; and a thread sanitizer would miss the threads' ends.) */
static void a_process_that_just_ends(void **state)
{
    if (!s3_wanted())
        skip();
    for (int i = 0; i < 4; i++) {
        fflush(NULL);
        pid_t pid = fork();
        if (!pid) {
            struct api a = { 0 };
            open_node(&a, MORE(STORE, "remote_scan_ms", "10"));
            put_chain(&a, 1, 8);
            usleep(20000 * (unsigned)i);
            exit(0);
        }
        int status;
        assert_int_equal(waitpid(pid, &status, 0), pid);
        assert_int_equal(status, 0);
    }
}

static void a_hung_store_that_comes_back(void **state)
{
    struct api a = { 0 }, b = { 0 };

    open_node(&a, MORE(STORE));
    put_chain(&a, 1, 8);
    close_node(&a);
    open_node(&b, MORE(STORE, "remote_timeout_ms", if_s3("4000", "200")));
    assert_true(reaches(&b, 1, 8));
    int fuse = hang();
    if (fuse < 0) {
        close_node(&b);
        skip();
    }
    assert_int_equal(get_and_check(&b, 1, 8), 0);
    hang_no_more(fuse);
    assert_true(reaches(&b, 1, 8));
    wait_until(get_and_check(&b, 1, 8) == 8);
    wait_until(status_number(&b, "quarantined") == 0);
    close_node(&b);
}

/* ---- with peers ---- */

#define PEERS "redis_host", redis_path, "node_ttl_seconds", "3", "peer_timeout_ms", "1000", "enable_p2p_cpu", "1"

static void peers_and_store_together(void **state)
{
    struct api a = { 0 }, b = { 0 }, c = { 0 };

    if (system("redis-server --version > /dev/null 2>&1"))
        skip();
    make_dir(redis_dir, sizeof(redis_dir));
    start_redis();
    open_node(&a, MORE(STORE, PEERS));
    assert_int_equal(put_chain(&a, 1, 10).blocks_ok, 10);
    assert_int_equal(put_chain(&a, 2, 10).blocks_ok, 10);
    wait_stored(&a, 20);
    close_node(&a);                     /* what it had is in the store alone */

    open_node(&b, MORE(STORE, PEERS));
    open_node(&c, MORE("enable_3rd_remote", "0", PEERS));   /* knows no store */
    assert_true(reaches(&b, 1, 10));
    assert_int_equal(get_and_check(&b, 1, 10), 10);
    assert_int_equal(status_number(&b, "read_blocks"), 10);
    assert_true(reaches(&c, 1, 10));                        /* from b's memory */
    assert_int_equal(get_and_check(&c, 1, 10), 10);

    assert_int_equal(put_chain(&c, 2, 14).blocks_ok, 14);   /* in c's memory; 10 of them in the store, too */
    assert_true(reaches(&b, 2, 14));
    assert_int_equal(get_and_check(&b, 2, 14), 14);

    assert_int_equal(put_chain(&c, 3, 6).blocks_ok, 6);     /* 6 in c's memory, behind them 6 in the store */
    open_node(&a, MORE(STORE));
    assert_int_equal(put_chain(&a, 3, 12).blocks_ok, 12);
    wait_stored(&a, 12);
    close_node(&a);
    assert_true(reaches(&b, 3, 12));
    assert_int_equal(get_and_check(&b, 3, 12), 12);

    assert_int_equal(put_chain(&c, 4, 8).blocks_ok, 8);     /* a peer that goes: the store has what it had */
    assert_true(reaches(&b, 4, 8));
    open_node(&a, MORE(STORE));
    assert_int_equal(put_chain(&a, 4, 8).blocks_ok, 8);
    close_node(&a);
    wait_until(status_number(&b, "blocks") >= 20 + 4 + 12 + 8);
    close_node(&c);
    assert_int_equal(get_and_check(&b, 4, 8), 8);
    close_node(&b);
    stop_redis();
    remove_dir(redis_dir);
}

int main(void)
{
#define test(f) cmocka_unit_test_setup_teardown(f, make_store, remove_store)
    const struct CMUnitTest tests[] = {
        test(a_process_that_just_ends),         /* first: forks before there are threads */
        test(what_one_put_another_gets),
        test(others_are_seen_while_both_run),
        test(what_left_memory_comes_back),
        test(a_prefetch_brings_them),
        test(namespaces_are_apart),
        test(kv_events_tell_of_them),
        test(only_what_is_used_again),
        test(a_reset_forgets_them),
        test(wrong_bytes_are_not_delivered),
        test(settings_that_cannot_be),
        test(buckets_that_cannot_be),
        test(a_full_store_is_read),
        test(a_hung_store_hangs_nobody),
        test(a_hung_store_that_comes_back),
        test(peers_and_store_together),
    };

    fk_log_set_level(FK_LOG_OFF);
    if (s3_wanted())
        s3_start();
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    s3_stop();
    return failed;
}
