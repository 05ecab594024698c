/*
 * sharing.c - a node in a cluster (enable_p2p_cpu, enable_p2p_ssd): the shell round the peer tier. It opens the
 * transport, whose thread pumps fetches, the cluster's state machine and its Redis thread.
 *
 *   caller's match -> core -> fk_node_reach -> the remote index          (node->lock, inside it cluster_lock)
 *   core's fetches -> transport's thread: turn -> reads -> turn -> core, or the shared store (remote.c)
 *   peers' reads  -> transport's thread -> grant (node->lock) -> cpu slot, or I/O thread -> staging buffer
 *   core's events -> whoever gives up node->lock -> the cluster's changes -> Redis thread
 */
#include <jansson.h>
#include <stdio.h>

#include <openssl/rand.h>
#include <openssl/sha.h>

#include "api/config_impl.h"
#include "api/sharing.h"
#include "base/clock.h"
#include "events/names.h"
#include "transport/mooncake_config.h"

#define LEAVE_US 500000u
#define SECRET_BYTES_MIN 16u
#define WHY_NO_METADATA "FlexKV's nodes tell each other their addresses through redis_host; Mooncake's engines reach this " \
                        "one by P2PHANDSHAKE"

bool fk_node_shares(const struct fk_settings *set)
{
    return set->enable_p2p_cpu || set->enable_p2p_ssd;
}

void fk_redis_params_from(const struct fk_settings *s, struct fk_redis_params *out)
{
    *out = (struct fk_redis_params){
        .host = s->redis_host, .port = (uint16_t)s->redis_port, .user = s->redis_user,
        .password = s->redis_password, .db = (uint32_t)s->redis_db, .tls = s->redis_tls,
        .tls_ca = s->redis_tls_ca, .tls_cert = s->redis_tls_cert, .tls_key = s->redis_tls_key,
        .timeout_us = (uint64_t)s->redis_timeout_ms * 1000,
    };
}

/* ---- what the core asks for, what it tells ---- */

void fk_node_share_wake(struct fk_node *node)
{
    struct fk_sharing *sh = node->sharing;

    if (sh->signalled || (sh->has_thread && pthread_equal(pthread_self(), sh->thread)))
        return;
    sh->signalled = true;
    fk_transport_wake(sh->transport);
}

void fk_node_share_tell(struct fk_node *node, const struct fk_core_event *ev, uint32_t n)
{
    fk_peers_tell(node->sharing->peers, ev, n, fk_clock_us());
    if (node->sharing->redis)
        fk_redis_wake(node->sharing->redis);
}

void fk_node_share_lost(struct fk_node *node)
{
    fk_peers_events_lost(node->sharing->peers, fk_clock_us());
    if (node->sharing->redis)
        fk_redis_wake(node->sharing->redis);
}

uint32_t fk_node_share_reach(struct fk_node *node, const struct fk_instance *in, const struct fk_key *keys, uint32_t n,
                             uint32_t known, uint64_t now)
{
    return fk_peers_reach(node->sharing->peers, in->id, in->space->id, keys, n, known, now);
}

int fk_node_share_space(struct fk_space *s)
{
    struct fk_node *node = s->node;
    struct fk_peers_space d = {
        .id = s->id, .block_bytes = s->block_bytes, .slot_bytes = s->slot_bytes, .pool = fk_pool_base(s->pool),
        .slots = { s->cpu_slots, s->ssd_slots },
    };

    memcpy(d.fingerprint, s->fingerprint, sizeof(d.fingerprint));
    int rc = fk_peers_space(node->sharing->peers, &d);
    if (rc)
        return fk_api_fail(rc, "space %s: cannot be shared with other nodes: %s", s->name, strerror(-rc));
    for (size_t i = 0; i < node->groups.len; i++)
        if (node->groups.data[i].space == s->id && node->groups.data[i].unshared)
            fk_peers_group_private(node->sharing->peers, node->groups.data[i].group);
    return 0;
}

/* The slot gets other bytes: what they sum up to, and what routers call them, is not known. */
void fk_node_slot_filling(void *ctx, uint32_t space, uint32_t slot)
{
    struct fk_space *s = fk_node_space(ctx, space);
    _Atomic uint64_t *sums = s ? fk_space_sums(s, slot, 0) : NULL;

    for (uint32_t i = 0; sums && i < s->ranks; i++)
        atomic_store(&sums[i], 0);
    if (s && s->names) {
        fk_node_events_drain(s->node);
        fk_names_set(s->names, slot, &(struct fk_name){ 0 }, NULL);
    }
}

static uint32_t scan(void *arg, uint64_t cursor, struct fk_change *out, uint32_t max, uint64_t *next, bool *end)
{
    struct fk_node *node = arg;

    pthread_mutex_lock(&node->lock);
    fk_node_events_drain(node);
    uint32_t n = fk_peers_scan(node->sharing->peers, cursor, out, max, next, end);
    fk_node_unlock(node);
    return n;
}

/* ---- others' reads ---- */

static int grant(void *ctx, const struct fk_block_ref *r, struct fk_grant *g)
{
    struct fk_node *node = ctx;

    pthread_mutex_lock(&node->lock);
    /* A read can come before the node is whole. */
    int rc = node->sharing ? fk_peers_grant(node->sharing->peers, r, g) : -ENOENT;
    fk_node_unlock(node);
    return rc;
}

static int release(void *ctx, const struct fk_block_ref *r, struct fk_grant *g)
{
    struct fk_node *node = ctx;

    pthread_mutex_lock(&node->lock);
    int rc = fk_peers_release(node->sharing->peers, r, g);
    fk_node_unlock(node);
    return rc;
}

/* ---- SSD blocks for others: read by the I/O thread ---- */

#define STAGE_ID (UINT64_C(3) << 62)

bool fk_node_stage_wanted(const struct fk_node *node)
{
    return node->sharing && fk_peers_wants_stage(node->sharing->peers);
}

uint32_t fk_node_stage_take(struct fk_node *node, struct fk_peers_stage *out, uint32_t max)
{
    return node->sharing ? fk_peers_take_stage(node->sharing->peers, out, max) : 0;
}

void fk_node_stage_submit(struct fk_node *node, const struct fk_peers_stage *stage, uint32_t n, uint64_t now)
{
    for (uint32_t i = 0; i < n; i++) {
        struct fk_space *s = fk_node_space(node, stage[i].space);
        struct fk_ssd_req req = { .op = FK_IO_READ, .slot = stage[i].ssd_slot, .buf = stage[i].buffer,
                                  .key = stage[i].key, .id = STAGE_ID | stage[i].id };
        fk_ssd_submit(s->ssd, &req, 1, now);
    }
}

bool fk_node_stage_done(struct fk_node *node, const struct fk_core_ssd_done *done)
{
    if ((done->id & STAGE_ID) != STAGE_ID)
        return false;
    fk_peers_staged(node->sharing->peers, (uint32_t)done->id, done->status);
    return true;
}

/* ---- the turn: in the transport's thread ---- */

static uint64_t turn(void *ctx)
{
    struct fk_node *node = ctx;
    uint64_t now = fk_clock_us(), next = UINT64_MAX;

    pthread_mutex_lock(&node->lock);
    struct fk_sharing *sh = node->sharing;
    if (sh) {                           /* not before the node is whole */
        sh->thread = pthread_self();
        sh->has_thread = true;
        sh->signalled = false;
        fk_peers_pump(sh->peers, now);
        for (struct fk_space *s = node->remote ? NULL : node->spaces; s; s = s->next) {
            struct fk_rate block = fk_peers_block_rate(sh->peers, s->id);
            fk_rates_fetched(s, &block);    /* with a store remote.c tells what both take */
        }
        next = fk_peers_next_wakeup(sh->peers);
    }
    fk_node_unlock(node);
    return next;
}

/* ---- opening ---- */

static bool is_loopback(const char *ip)
{
    return strncmp(ip, "127.", 4) == 0 || strcmp(ip, "::1") == 0;
}

/* What members prove that they belong to the cluster by. */
static int make_secret(const struct fk_settings *set, char *out, size_t bytes)
{
    unsigned char digest[SHA256_DIGEST_LENGTH];
    char text[1024];

    if (*set->cluster_secret) {
        if (strlen(set->cluster_secret) < SECRET_BYTES_MIN)
            return fk_api_fail(-EINVAL, "cluster_secret: at least %u characters are wanted", SECRET_BYTES_MIN);
        snprintf(out, bytes, "%s", set->cluster_secret);
        return 0;
    }
    if (!*set->redis_password && !is_loopback(set->local_ip))
        return fk_api_fail(-EINVAL, "cluster_secret is not set, so anybody at %s could read the cache: set it, to the same "
                           "text of at least %u characters, on all nodes (or a redis_password, from which it is "
                           "made then)", set->local_ip, SECRET_BYTES_MIN);
    snprintf(text, sizeof(text), "flexkv cluster %s secret %s", set->cluster_name, set->redis_password);
    SHA256((const unsigned char *)text, strlen(text), digest);
    fk_hex(out, digest, fk_min(sizeof(digest), (bytes - 1) / 2));
    return 0;
}

/* The address to listen at: p2p_listen, what Mooncake's file says, or any port of local_ip. */
static int make_listen(const struct fk_settings *set, char *listen, size_t bytes, char *metadata, size_t metadata_bytes)
{
    const char *ip = *set->mooncake_engine_ip ? set->mooncake_engine_ip : set->local_ip;
    bool mooncake = strcmp(set->p2p_transport, "mooncake") == 0;
    struct fk_mooncake_config file;
    char error[400];

    snprintf(metadata, metadata_bytes, "P2PHANDSHAKE");
    snprintf(listen, bytes, strchr(set->local_ip, ':') ? "[%s]:0" : "%s:0", set->local_ip);
    if (mooncake && *set->mooncake_config_path) {
        int rc = fk_mooncake_config_load(set->mooncake_config_path, &file, error, sizeof(error));
        if (rc)
            return fk_api_fail(rc, "%s", error);
        snprintf(listen, bytes, "%s", file.listen);
        snprintf(metadata, metadata_bytes, "%s", file.metadata);
        if (file.redis)
            fk_info("%s: its Redis is not asked: " WHY_NO_METADATA, set->mooncake_config_path);
    } else if (mooncake) {
        snprintf(listen, bytes, strchr(ip, ':') ? "[%s]:%lld" : "%s:%lld", ip, (long long)set->mooncake_engine_port);
        if (strncmp(set->mooncake_metadata_server, "http://", 7) == 0)
            snprintf(metadata, metadata_bytes, "%s", set->mooncake_metadata_server);
        else if (*set->mooncake_metadata_server)
            fk_info("mooncake_metadata_server is not asked: " WHY_NO_METADATA);
    } else if (*set->mooncake_config_path || *set->mooncake_engine_ip) {
        fk_info("Mooncake's settings are not used, as p2p_transport is %s; with p2p_transport=mooncake they are",
                set->p2p_transport);
    }
    if (*set->p2p_listen)
        snprintf(listen, bytes, strchr(set->p2p_listen, ':') ? "%s" : "%s:0", set->p2p_listen);
    return 0;
}

static int open_transport(struct fk_sharing *sh, const struct fk_settings *set)
{
    char secret[256], listen[160], metadata[256], error[500];
    struct fk_transport_params params = {
        .transport = set->p2p_transport, .listen = listen, .secret = secret, .cluster = set->cluster_name,
        .provider = { .grant = grant, .release = release, .ctx = sh->node }, .turn = turn, .turn_ctx = sh->node,
        .timeout_ms = (uint32_t)set->peer_timeout_ms, .fabric = *set->fabric_provider ? set->fabric_provider : NULL,
        .mooncake_metadata = metadata, .nixl_library = *set->nixl_library ? set->nixl_library : NULL,
        .nixl_plugin = *set->nixl_transport_plugin ? set->nixl_transport_plugin : NULL,
    };
    int rc = make_secret(set, secret, sizeof(secret));

    rc = rc ? rc : make_listen(set, listen, sizeof(listen), metadata, sizeof(metadata));
    if (rc)
        return rc;
    if (RAND_bytes((unsigned char *)&params.node, sizeof(params.node)) != 1)
        return fk_api_fail(-EIO, "no random bytes can be had");
    params.epoch = fk_clock_ns();
    rc = fk_transport_open(&params, &sh->transport, error, sizeof(error));
    return rc ? fk_api_fail(rc, "p2p_transport, p2p_listen %s: %s", listen, error) : 0;
}

/* local_ip with the port that we really listen at, unless a name was given. */
static void make_name(struct fk_sharing *sh, const struct fk_settings *set)
{
    const char *from = *set->node_name ? set->node_name : fk_transport_address(sh->transport);
    size_t n = 0;

    for (; *from && n + 1 < sizeof(sh->name); from++)
        if (*set->node_name || !strchr("[]", *from))
            sh->name[n++] = *from;
}

static int open_cluster(struct fk_sharing *sh, const struct fk_settings *set)
{
    struct fk_cluster_params params = {
        .cluster = set->cluster_name, .name = sh->name, .zone = *set->node_zone ? set->node_zone : NULL,
        .ttl_us = (uint64_t)set->node_ttl_seconds * 1000000, .timeout_us = (uint64_t)set->redis_timeout_ms * 1000,
    };
    char address[FK_CLUSTER_ADDRESS_MAX];

    if (!fk_cluster_name_valid(sh->name))
        return fk_api_fail(-EINVAL, "node_name: \"%s\" is not a name: 1 to 63 letters, digits and . _ - :", sh->name);
    if (!fk_cluster_name_valid(set->cluster_name))
        return fk_api_fail(-EINVAL, "cluster_name: \"%s\" is not a name: 1 to 63 letters, digits and . _ - :",
                           set->cluster_name);
    if (RAND_bytes((unsigned char *)&params.seed, sizeof(params.seed)) != 1)
        return fk_api_fail(-EIO, "no random bytes can be had");
    int rc = fk_cluster_create(&params, fk_clock_us(), &sh->cluster);
    if (!rc && snprintf(address, sizeof(address), "%s=%s", set->p2p_transport, fk_transport_address(sh->transport)) <
        (int)sizeof(address))
        rc = fk_cluster_address(sh->cluster, address);
    return rc ? fk_api_fail(rc, "cannot set up the cluster: %s", strerror(-rc)) : 0;
}

static int start_redis(struct fk_sharing *sh, const struct fk_settings *set)
{
    struct fk_redis_params params;
    char error[400] = "";

    fk_redis_params_from(set, &params);
    params.cluster = sh->cluster;
    params.lock = &sh->cluster_lock;
    params.scan = scan;
    params.arg = sh->node;
    struct fk_redis *redis = NULL;
    int rc = fk_redis_start(&params, &redis, error, sizeof(error));
    pthread_mutex_lock(&sh->node->lock);
    sh->redis = redis;
    pthread_mutex_unlock(&sh->node->lock);
    return rc ? fk_api_fail(rc, "%s", *error ? error : strerror(-rc)) : 0;
}

static void stop(struct fk_sharing *sh)
{
    struct fk_node *node = sh->node;
    struct fk_redis *redis;

    pthread_mutex_lock(&node->lock);
    redis = sh->redis;
    sh->redis = NULL;
    pthread_mutex_unlock(&node->lock);
    if (redis)
        fk_redis_stop(redis, LEAVE_US);
    if (sh->transport)
        fk_transport_close(sh->transport);
    sh->transport = NULL;
}

static void free_sharing(struct fk_sharing *sh)
{
    fk_peers_destroy(sh->peers);
    fk_cluster_destroy(sh->cluster);
    pthread_mutex_destroy(&sh->cluster_lock);
    free(sh);
}

static void set_sharing(struct fk_node *node, struct fk_sharing *sh)
{
    pthread_mutex_lock(&node->lock);
    node->sharing = sh;
    pthread_mutex_unlock(&node->lock);
}

int fk_node_share_start(struct fk_node *node)
{
    const struct fk_settings *set = node->set;
    struct fk_sharing *sh = calloc(1, sizeof(*sh));

    if (!sh)
        return fk_api_fail(-ENOMEM, "out of memory");
    sh->node = node;
    pthread_mutex_init(&sh->cluster_lock, NULL);
    int rc = open_transport(sh, set);
    if (!rc) {
        make_name(sh, set);
        rc = open_cluster(sh, set);
    }
    struct fk_peers_params params = {
        .core = node->core, .cluster = sh->cluster, .cluster_lock = &sh->cluster_lock, .transport = sh->transport,
        .share_cpu = set->enable_p2p_cpu, .share_ssd = set->enable_p2p_ssd,
        .timeout_us = (uint64_t)set->peer_timeout_ms * 1000, .filling = fk_node_slot_filling,
        .hand_on = fk_node_remote_fetch, .ctx = node,
    };
    if (!rc && (rc = fk_peers_create(&params, &sh->peers)))
        fk_api_fail(rc, "out of memory");
    if (!rc) {
        set_sharing(node, sh);
        rc = start_redis(sh, set);
    }
    if (!rc)
        fk_transport_wake(sh->transport);
    if (rc) {
        stop(sh);
        set_sharing(node, NULL);
        free_sharing(sh);
        return rc;
    }
    fk_info("node %s of cluster %s: shares %s%s%s, read at %s=%s", sh->name, set->cluster_name,
            set->enable_p2p_cpu ? "cpu" : "", set->enable_p2p_cpu && set->enable_p2p_ssd ? " and " : "",
            set->enable_p2p_ssd ? "SSD" : "", set->p2p_transport, fk_transport_address(sh->transport));
    return 0;
}

/* Nobody reads from us, we read from nobody; the slots are left alone. The core goes on. */
void fk_node_share_stop(struct fk_node *node)
{
    if (node->sharing)
        stop(node->sharing);
}

void fk_node_share_free(struct fk_node *node)
{
    if (node->sharing)
        free_sharing(node->sharing);
    node->sharing = NULL;
}

/* ---- for status ---- */

static void peers_json(const struct fk_sharing *sh, json_t *o)
{
    struct fk_cluster_peer peer[64];
    json_t *list = json_array();
    uint64_t now = fk_clock_us();
    uint32_t n = fk_cluster_peers(sh->cluster, now, peer, 64);

    for (uint32_t i = 0; i < n && i < 64; i++) {
        json_t *p = json_object();
        json_object_set_new(p, "name", json_string(peer[i].record->name));
        json_object_set_new(p, "epoch", json_integer((json_int_t)peer[i].epoch));
        json_object_set_new(p, "cpu_blocks", json_integer((json_int_t)peer[i].blocks[0]));
        json_object_set_new(p, "ssd_blocks", json_integer((json_int_t)peer[i].blocks[1]));
        json_object_set_new(p, "synced", json_boolean(peer[i].synced));
        json_object_set_new(p, "alive", json_boolean(peer[i].lease_us > 0));
        json_array_append_new(list, p);
    }
    json_object_set_new(o, "peers", list);
}

/* With the node's lock. */
json_t *fk_node_share_json(const struct fk_node *node)
{
    struct fk_sharing *sh = node->sharing;
    struct fk_cluster_stats cs;
    struct fk_peers_stats ps;
    json_t *o = json_object();
    char error[300] = "";
    int rc = fk_redis_state(sh->redis, error, sizeof(error));

    pthread_mutex_lock(&sh->cluster_lock);
    fk_cluster_get_stats(sh->cluster, &cs);
    json_object_set_new(o, "epoch", json_integer((json_int_t)fk_cluster_epoch(sh->cluster)));
    peers_json(sh, o);
    pthread_mutex_unlock(&sh->cluster_lock);
    fk_peers_get_stats(sh->peers, &ps);
    json_object_set_new(o, "name", json_string(sh->name));
    json_object_set_new(o, "cluster", json_string(node->set->cluster_name));
    json_object_set_new(o, "redis", json_string(rc ? error : "connected"));
    json_object_set_new(o, "transport", json_string(fk_transport_name(sh->transport)));
    json_object_set_new(o, "address", json_string(fk_transport_address(sh->transport)));
    const struct { const char *name; uint64_t value; } numbers[] = {
        { "remote_blocks", cs.remote.holders }, { "remote_index_bytes", cs.remote.bytes },
        { "changes_told", cs.changes }, { "changes_seen", cs.changes_seen }, { "changes_pending", cs.pending },
        { "gaps", cs.gaps }, { "snapshots_read", cs.snapshots_read }, { "fenced", cs.fenced },
        { "fetched_blocks", ps.fetched_blocks }, { "fetched_bytes", ps.fetched_bytes },
        { "failed_blocks", ps.failed_blocks }, { "retried", ps.retried }, { "not_there", ps.not_there },
        { "lent_blocks", ps.lent_blocks }, { "refused", ps.refused }, { "in_flight", ps.in_flight },
        { "lent_now", ps.lent_now }, { "quarantined", ps.quarantined },
    };
    for (size_t i = 0; i < fk_array_size(numbers); i++)
        json_object_set_new(o, numbers[i].name, json_integer((json_int_t)numbers[i].value));
    return o;
}

void fk_node_share_stats(struct fk_node *node, flexkv_stats *out)
{
    struct fk_transport_stats ts;

    fk_transport_get_stats(node->sharing->transport, &ts);
    out->peer.bytes_read = ts.read_bytes;
    out->peer.bytes_written = ts.served_bytes;
}
