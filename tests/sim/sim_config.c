/*
 * sim_config.c - draws the configuration of a world from its seed: sizes, policies, timings
 * and which kinds of trouble there are. Touches s->config only. Caller: sim.c.
 */
#include "sim.h"

#include <stdio.h>

static void draw_quotas(struct sim *s, struct sim_space_config *c)
{
    uint32_t slots[FK_TIERS] = { c->cpu_slots, c->ssd_slots };
    uint32_t left[FK_TIERS] = { c->cpu_slots / 2, c->ssd_slots / 2 };

    c->quotas = sim_chance(s, 2);
    for (uint32_t i = 0; i < c->n_ns; i++) {
        for (int t = 0; t < FK_TIERS; t++) {
            struct fk_core_quota *q = &c->quota[i];
            q->max[t] = UINT32_MAX;
            q->guaranteed[t] = 0;
            if (!c->quotas || !slots[t])
                continue;
            if (sim_chance(s, 2))
                q->guaranteed[t] = sim_below(s, left[t] + 1);
            left[t] -= q->guaranteed[t];
            if (sim_chance(s, 2))
                q->max[t] = q->guaranteed[t] + sim_range(s, 1, slots[t]);
        }
        c->quota[i].tag = i + 1;
    }
}

static void draw_space(struct sim *s, struct sim_space_config *c)
{
    static const uint32_t slices[] = { 64, 128, 192, 512, 512, 1024, 4096 };

    memset(c, 0, sizeof(*c));
    c->slice_bytes = slices[sim_below(s, fk_array_size(slices))];
    c->ranks = sim_range(s, 1, SIM_MAX_RANKS);
    c->cpu_slots = sim_chance(s, 3) ? sim_range(s, 4, 16) : sim_range(s, 8, 200);
    c->ssd_slots = sim_chance(s, 5) ? 0 : sim_chance(s, 3) ? sim_range(s, 1, 24)
                                                          : sim_range(s, 24, 400);
    c->stripe_slots = sim_range(s, 1, sim_chance(s, 2) ? 4 : 32);
    c->io_chunk = 4096u << sim_below(s, 5);
    c->n_ns = sim_range(s, 1, SIM_MAX_NS);
    c->pages = sim_range(s, 48, 256);
    c->max_chain = sim_chance(s, 3) ? sim_range(s, 2, 6) : sim_range(s, 4, SIM_MAX_CHAIN);
    c->alphabet = sim_range(s, 2, 4);
    draw_quotas(s, c);
}

static void draw_core(struct sim *s, struct fk_core_params *p)
{
    static const double thresholds[] = { 1.0, 1.0, 0.9, 0.7, 0.5 };
    static const double ratios[] = { 0.0, 0.05, 0.05, 0.2 };

    *p = (struct fk_core_params){ .max_spaces = SIM_MAX_SPACES, .events = true };
    p->policy.kind = (enum fk_policy_kind)sim_below(s, FK_POLICY_KINDS);
    p->policy.hit_reward_ticks = sim_chance(s, 2) ? 0 : sim_below(s, 1000);
    p->policy.slru_protected_threshold = sim_range(s, 1, 4);
    p->policy.seed = fk_rng_next(&s->rng);
    p->seed = fk_rng_next(&s->rng);
    p->evict_start_threshold = thresholds[sim_below(s, fk_array_size(thresholds))];
    p->evict_ratio = ratios[sim_below(s, fk_array_size(ratios))];
    p->write_policy = (enum fk_write_policy)sim_below(s, 3);
    p->op_timeout_us = s->config.calm ? 60000000 : sim_range(s, 2000, 60000);
    p->lease_timeout_us = sim_range(s, 1000, 40000);
    p->cancel_grace_us = sim_range(s, 200, 10000);
    p->read_window_blocks = sim_chance(s, 2) ? 0 : sim_range(s, 1, 16);
}

static void draw_faults(struct sim *s, struct sim_config *c)
{
    bool heavy = sim_chance(s, 4);

    c->faults.min_us = 5;
    c->faults.max_us = sim_range(s, 20, 400);
    c->faults.slow_us = 100000;
    if (c->calm)
        return;
    c->disk_faults = sim_chance(s, 2);
    for (unsigned i = 0; i < SIM_FAULTS && c->disk_faults; i++)
        if (sim_chance(s, 2))
            c->faults.ppm[i] = sim_range(s, 1, heavy ? 100000 : 10000);
    c->faults.tables = c->disk_faults && sim_chance(s, 3);
    c->rot = sim_chance(s, 5);
    c->agent_faults = sim_chance(s, 3);
    c->stalls = sim_chance(s, 4);
    c->crashes = sim_chance(s, 2);
    c->power_loss = c->crashes && sim_chance(s, 4);
    c->dirs_go = sim_chance(s, 5);
}

void sim_config_draw(struct sim *s)
{
    struct sim_config *c = &s->config;

    memset(c, 0, sizeof(*c));
    c->calm = sim_chance(s, 4);
    c->n_spaces = sim_chance(s, 2) ? 1 : sim_range(s, 1, SIM_MAX_SPACES);
    c->n_dirs = sim_range(s, 1, SIM_DISK_DIRS);
    for (uint32_t i = 0; i < c->n_spaces; i++)
        draw_space(s, &c->space[i]);
    draw_core(s, &c->core);
    draw_faults(s, c);
    c->resets = sim_chance(s, 2);
    c->reopens = sim_chance(s, 2);
    c->agent_us = sim_chance(s, 4) ? sim_range(s, 50, 500) : sim_range(s, 1, 40);
    c->device_errors = sim_range(s, 1, 8);
    c->device_retry_us = sim_range(s, 500, 20000);
    c->quiet_every = sim_range(s, 500, 3000);
    c->scan_every = sim_range(s, 24, 128);
    s->early_rng = s->seed * 0x9e3779b97f4a7c15ull + 2;
    c->early = sim_early_chance(s, 2) ? 1 + fk_rng_below(&s->early_rng, 6) : 0;
}

void sim_config_print(const struct sim *s)
{
    static const char *const write_names[] = { "through", "on_reuse", "on_evict" };
    const struct sim_config *c = &s->config;

    printf("seed %llu: %s policy %s write %s evict %.2f/%.2f dirs %u%s%s%s%s%s%s%s%s%s%s\n",
           (unsigned long long)s->seed, c->calm ? "calm" : "rough",
           fk_policy_name(c->core.policy.kind), write_names[c->core.write_policy],
           c->core.evict_start_threshold, c->core.evict_ratio, c->n_dirs,
           c->disk_faults ? " disk-faults" : "", c->faults.tables ? " table-faults" : "",
           c->rot ? " rot" : "", c->agent_faults ? " agent-faults" : "",
           c->stalls ? " stalls" : "", c->crashes ? " crashes" : "",
           c->power_loss ? " power-loss" : "", c->dirs_go ? " dirs" : "",
           c->resets ? " resets" : "", c->early ? " early" : "");
    for (uint32_t i = 0; i < c->n_spaces; i++)
        printf("  space %u: %u ranks x %u bytes, cpu %u, ssd %u (stripe %u), %u namespaces%s\n", i,
               c->space[i].ranks, c->space[i].slice_bytes, c->space[i].cpu_slots,
               c->space[i].ssd_slots, c->space[i].stripe_slots, c->space[i].n_ns,
               c->space[i].quotas ? " with quotas" : "");
}
