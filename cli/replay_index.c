/*
 * replay_index.c - `flexkv replay --hit-only`: drives the core directly, as its own shell.
 * No bytes, no threads; the time is the trace's. Every copy job and SSD request that the
 * core asks for is answered at once, so what is measured is index, policy and planning.
 * Bytes are counted as they would be moved. Caller: replay.c.
 */
#include "base/clock.h"
#include "node/core.h"
#include "replay.h"

#define SSD_BATCH 256u
#define HASH_BATCH 256u
#define MS_US 1000ull

struct shell {
    const struct replay_plan *plan;
    struct replay_result *res;
    struct fk_core *core;
    struct fk_config *config;
    struct fk_key seed;
    struct fk_key *keys;
    uint32_t *pages;                /* 0, 1, 2, ...: nobody reads them */
    uint32_t space, instance, group;
    uint64_t copied_blocks, ssd_read_blocks, ssd_written_blocks;
    uint32_t got_blocks;            /* of the last get */
    bool sample_due;
};

static int complain(const char *what, int rc)
{
    fprintf(stderr, "flexkv replay: %s: %s\n", what, strerror(-rc));
    return 1;
}

static int set_option(void *arg, const char *key, const char *value)
{
    struct shell *s = arg;
    int rc = fk_config_set(s->config, key, value, "replay");

    if (rc)
        fprintf(stderr, "flexkv replay: %s\n", fk_config_error(s->config));
    return rc ? 2 : 0;
}

static struct fk_core_params core_params(const struct fk_settings *c)
{
    return (struct fk_core_params){
        .max_spaces = 1,
        .policy = {
            .kind = (enum fk_policy_kind)c->eviction_policy,
            .hit_reward_ticks = (uint32_t)fk_min(c->hit_reward_seconds * 1000, (int64_t)INT32_MAX),
            .slru_protected_threshold = (uint32_t)c->slru_protected_threshold,
            .seed = 1,
        },
        .evict_start_threshold = c->evict_start_threshold,
        .evict_ratio = c->evict_ratio,
        .write_policy = (enum fk_write_policy)c->ssd_write_policy,
        .op_timeout_us = (uint64_t)c->op_timeout_ms * MS_US,
        .lease_timeout_us = (uint64_t)c->lease_timeout_ms * MS_US,
        .cancel_grace_us = 1000 * MS_US,
        .seed = 1,
    };
}

static int shell_open(struct shell *s)
{
    const struct replay_plan *p = s->plan;
    int rc = fk_config_create(&s->config);

    if (rc)
        return complain("configuration", rc);
    rc = replay_plan_config(p, set_option, s);
    if (rc)
        return rc;
    if (fk_config_finish(s->config)) {
        fprintf(stderr, "flexkv replay: %s\n", fk_config_error(s->config));
        return 2;
    }
    struct fk_core_params params = core_params(&s->config->settings);
    struct fk_core_space_params space = {
        .cpu_slots = p->cpu_slots, .ssd_slots = p->ssd_slots, .ssd_stripe_slots = p->ssd_slots,
        .ssd_dirs = p->ssd_slots ? 1 : 0,
    };
    rc = fk_core_create(&params, &s->core);
    if (!rc)
        rc = fk_core_space_add(s->core, &space, &s->space);
    if (!rc)
        rc = fk_core_instance_add(s->core, s->space, 1, &s->instance);
    if (rc)
        return complain("the core", rc);
    s->group = fk_core_space_default_group(s->core, s->space);
    s->seed = fk_key_seed("replay", 6, NULL, 0);
    s->keys = malloc(((size_t)p->max_blocks + 1) * sizeof(*s->keys));
    s->pages = malloc(((size_t)p->max_blocks + 1) * sizeof(*s->pages));
    if (!s->keys || !s->pages)
        return complain("memory for the keys of a request", -ENOMEM);
    for (uint32_t i = 0; i < p->max_blocks; i++)
        s->pages[i] = i;
    return 0;
}

static void shell_close(struct shell *s)
{
    if (s->core)
        fk_core_destroy(s->core);
    fk_config_destroy(s->config);
    free(s->keys);
    free(s->pages);
}

static void make_keys(struct shell *s, const struct trace_request *r)
{
    struct replay_hash hashes[HASH_BATCH];
    uint32_t n = replay_blocks(s->plan, r);

    for (uint32_t i = 0; i < n; i += HASH_BATCH) {
        uint32_t k = fk_min(HASH_BATCH, n - i);
        replay_hashes(s->plan, r, i, k, hashes);
        fk_key_from_hashes(s->seed, hashes, sizeof(*hashes), sizeof(*hashes), k, s->keys + i);
    }
}

static void answer_jobs(struct shell *s, uint64_t now_us)
{
    struct fk_job *job;

    while ((job = fk_core_take_job(s->core, s->instance, 0))) {
        s->copied_blocks += job->n;
        fk_core_job_done(s->core, job, job->n, 0, now_us);
    }
}

static void answer_ssd(struct shell *s, uint64_t now_us)
{
    struct fk_core_ssd_req reqs[SSD_BATCH];
    struct fk_core_ssd_done done[SSD_BATCH];
    uint32_t n, k;

    while ((n = fk_core_take_ssd(s->core, reqs, SSD_BATCH))) {
        k = 0;
        for (uint32_t i = 0; i < n; i++) {
            if (reqs[i].kind != FK_SSD_READ && reqs[i].kind != FK_SSD_WRITE)
                continue;
            s->ssd_read_blocks += reqs[i].kind == FK_SSD_READ;
            s->ssd_written_blocks += reqs[i].kind == FK_SSD_WRITE;
            done[k++] = (struct fk_core_ssd_done){ reqs[i].id, 0 };
        }
        if (k)
            fk_core_ssd_done(s->core, done, k, now_us);
    }
}

static void take_completions(struct shell *s)
{
    struct flexkv_completion c[8];
    uint32_t n;

    while ((n = fk_core_take_completions(s->core, c, 8)))
        for (uint32_t i = 0; i < n; i++)
            if (c[i].kind == FLEXKV_OP_GET)
                s->got_blocks = c[i].blocks_ok;
}

/* Answers everything the core asks for, until it asks for nothing. */
static void settle(struct shell *s, uint64_t now_us)
{
    for (;;) {
        struct fk_core_work work = fk_core_work(s->core);
        if (!work.jobs && !work.ssd && !work.completions)
            return;
        answer_jobs(s, now_us);
        answer_ssd(s, now_us);
        take_completions(s);
    }
}

static int replay_request(struct shell *s, const struct trace_request *r)
{
    uint32_t n = replay_blocks(s->plan, r);
    uint64_t now_us = r->time_us, op;
    struct flexkv_match_result m;
    struct fk_core_op_args args = { .pages = s->pages };

    make_keys(s, r);
    uint64_t t0 = fk_clock_ns();
    fk_core_match(s->core, s->instance, s->keys, n, now_us, &m);
    uint64_t t1 = fk_clock_ns();
    replay_note_latency(s->res, REPLAY_MATCH, t1 - t0);
    s->got_blocks = 0;
    if (m.blocks) {
        int rc = fk_core_get(s->core, m.lease, 0, m.blocks, &args, now_us, &op);
        replay_note_latency(s->res, REPLAY_GET, fk_clock_ns() - t1);
        if (rc)
            return complain("get", rc);
        settle(s, now_us);
        s->res->failed += m.blocks - s->got_blocks;
    }
    if (s->got_blocks < n) {
        uint64_t t2 = fk_clock_ns();
        int rc = fk_core_put(s->core, s->instance, s->group, s->keys, n, s->got_blocks, &args, now_us, &op);
        replay_note_latency(s->res, REPLAY_PUT, fk_clock_ns() - t2);
        if (rc)
            return complain("put", rc);
        settle(s, now_us);
    }
    uint32_t cpu = fk_min(m.cpu_blocks, s->got_blocks);
    s->sample_due = replay_note_request(s->res, r, cpu, s->got_blocks - cpu);
    return 0;
}

static struct replay_totals totals(const struct shell *s)
{
    struct flexkv_stats st = { .struct_bytes = sizeof(st) };
    uint64_t bytes = s->plan->options->block_bytes;

    fk_core_get_stats(s->core, &st);
    s->res->index_bytes = st.index_bytes;
    return (struct replay_totals){
        .cpu_copy_bytes = s->copied_blocks * bytes,
        .ssd_read_bytes = s->ssd_read_blocks * bytes,
        .ssd_write_bytes = s->ssd_written_blocks * bytes,
        .evicted_blocks = st.cpu.evicted_blocks + st.ssd.evicted_blocks,
        .used = { st.cpu.slots - st.cpu.free_slots, st.ssd.slots - st.ssd.free_slots },
    };
}

static int run(struct shell *s)
{
    const struct trace *t = s->plan->trace;

    for (size_t i = 0; i < t->requests.len && !replay_stopped(); i++) {
        const struct trace_request *r = &t->requests.data[i];
        if (fk_core_next_wakeup(s->core) <= r->time_us) {
            fk_core_tick(s->core, r->time_us);
            settle(s, r->time_us);
        }
        int rc = replay_request(s, r);
        if (rc)
            return rc;
        if (s->sample_due) {
            struct replay_totals now = totals(s);
            replay_sample(s->res, &now);
        }
        if (i % 64 == 0)
            replay_progress(s->res);
    }
    s->res->totals = totals(s);
    return 0;
}

int replay_run_index(const struct replay_plan *p, struct replay_result *res)
{
    struct shell s = { .plan = p, .res = res };
    int rc = shell_open(&s);

    if (!rc) {
        replay_result_start(res);
        rc = run(&s);
        replay_result_stop(res);
    }
    shell_close(&s);
    return rc;
}
