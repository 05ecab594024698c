/* objects_nixl.c - an object store through NIXL (src/nixl/objects.h): options to its plugins' parameters, nothing else. */
#include <stdio.h>
#include <strings.h>

#include "base/fail.h"
#include "base/util.h"
#include "nixl/objects.h"
#include "store/objects.h"

#define LATE_PER_THREAD 4u              /* buffers that may hang in NIXL */

/*
 * For the SDK in NIXL's plugin; whoever has set these knows better. With a key there it is not asked for the machine's role, which
 * takes seconds where there is none. And a request is tried three times, not eleven: ours are over by then, and their
 * buffers wait. (As with NIXL's own in src/nixl: once, while the node is opened.)
 */
static void set_environment(void)
{
    if (getenv("AWS_ACCESS_KEY_ID"))
        setenv("AWS_EC2_METADATA_DISABLED", "true", 0);
    setenv("AWS_RETRY_MODE", "standard", 0);
}

/* The path style of addresses is what others than AWS have for sure. Checksums beside ours are left out where they may be: not
 * all that speak S3 know the newer ones. */
static int nixl_open(const struct fk_store_params *p, void **client, char *error, size_t bytes)
{
    const struct fk_store_bucket *b = &p->bucket;
    bool azure = strcmp(b->plugin, "AZURE_BLOB") == 0, plain = strncasecmp(b->endpoint, "http://", 7) == 0;
    char threads[12];
    struct fk_nixl_param s3[] = {
        { "bucket", b->name }, { "endpoint_override", b->endpoint }, { "scheme", plain ? "http" : "https" },
        { "region", b->region }, { "ca_bundle", b->ca_file }, { "num_threads", threads },
        { "use_virtual_addressing", *b->endpoint ? "false" : "true" },
        { "req_checksum", "required" }, { "resp_checksum", "required" },
    };
    struct fk_nixl_param blobs[] = {
        { "container_name", b->name }, { "account_url", b->endpoint }, { "ca_bundle", b->ca_file },
        { "num_threads", threads },
    };
    struct fk_nixl_objects_params n = {
        .library = *b->library ? b->library : NULL, .plugin = *b->plugin ? b->plugin : "OBJ",
        .param = azure ? blobs : s3, .n_params = azure ? fk_array_size(blobs) : fk_array_size(s3),
        .max_late = p->threads * LATE_PER_THREAD,
    };
    char why[1024];
    struct fk_nixl_objects *o;

    set_environment();
    snprintf(threads, sizeof(threads), "%u", p->threads);
    int rc = fk_nixl_objects_open(&n, &o, why, sizeof(why));
    if (rc)
        return fk_fail(error, bytes, rc, "remote_backend nixl: %s", why);
    *client = o;
    return 0;
}

static void nixl_close(void *client)
{
    (void)fk_nixl_objects_close(client);
}

static int nixl_get(void *client, const char *name, const struct iovec *to, int n, uint64_t deadline_us)
{
    return fk_nixl_object_get(client, name, to, n, deadline_us);
}

static bool go(void *arg)
{
    const struct fk_store_sure *sure = arg;

    return !sure->sure || sure->sure(sure->arg, sure->user);
}

static int nixl_put(void *client, const char *name, const struct iovec *from, int n, const struct fk_store_sure *sure,
                    uint64_t deadline_us)
{
    return fk_nixl_object_put(client, name, from, n, sure ? go : NULL, (void *)(uintptr_t)sure, deadline_us);
}

static int nixl_exists(void *client, const char *name, uint64_t deadline_us)
{
    return fk_nixl_object_exists(client, name, deadline_us);
}

const struct fk_object_client fk_objects_nixl = {
    .open = nixl_open, .close = nixl_close, .get = nixl_get, .put = nixl_put, .exists = nixl_exists,
};
