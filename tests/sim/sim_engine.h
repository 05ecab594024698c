/*
 * sim_engine.h - the simulated disks: an engine backend (src/tier/engine.h) in memory.
 *
 *   struct sim_disk    what outlives a process: directories, files, their bytes
 *   struct sim_engine  what dies with it: I/O under way
 *
 * Each file has two images: what the kernel holds (survives kill -9) and what is on the
 * medium (survives power loss). I/O completes after a simulated delay, in any order, and
 * takes effect when it completes. Faults are decided per I/O from the seed.
 * Touches nothing outside its own memory and the simulated clock. Caller: the shell of
 * the simulated node (sim_node.c), and the real SSD tier through the vtable.
 */
#ifndef SIM_ENGINE_H
#define SIM_ENGINE_H

#include "tier/engine.h"

enum sim_fault {
    SIM_READ_ERROR, SIM_WRITE_ERROR, SIM_ENOSPC, SIM_READ_SHORT, SIM_WRITE_SHORT, SIM_READ_FLIP,
    SIM_WRITE_TORN, SIM_WRITE_LOST, SIM_WRITE_MISDIRECT, SIM_READ_MISDIRECT, SIM_DELAY,
    SIM_FAULTS
};

#define SIM_DISK_DIRS 4
#define SIM_DISK_FILES 64

struct sim_file {
    char path[160];
    unsigned dir;
    bool exists, table;
    uint64_t bytes;
    uint8_t *image;             /* what a reader sees */
    uint8_t *medium;            /* what a power loss leaves; NULL: not simulated */
    uint8_t *dirty;             /* a byte per sector: differs from the medium */
    uint32_t *dirty_list;
    uint32_t n_dirty;
};

struct sim_disk {
    struct sim_file files[SIM_DISK_FILES];
    uint32_t n_files;
    char dir_path[SIM_DISK_DIRS][128];
    unsigned n_dirs;
    bool dir_gone[SIM_DISK_DIRS];
    bool power_loss;            /* keep medium images */
};

struct sim_disk_faults {
    uint32_t ppm[SIM_FAULTS];   /* per I/O, in millionths */
    bool tables;                /* hit table files too */
    uint64_t min_us, max_us;    /* usual time of an I/O */
    uint64_t slow_us;           /* what SIM_DELAY adds at most */
};

struct sim_engine;

void sim_disk_init(struct sim_disk *d, const char *base, unsigned n_dirs, bool power_loss);
void sim_disk_free(struct sim_disk *d);
/* The directory's files are lost (a disk was replaced). */
void sim_disk_wipe_dir(struct sim_disk *d, unsigned dir, uint64_t *rng);
/* One bit of one file flips. Returns false if there is no byte to hit. */
bool sim_disk_rot(struct sim_disk *d, bool tables, uint64_t *rng);
/* Writes not on the medium are lost in any subset of sectors. */
void sim_disk_power_loss(struct sim_disk *d, uint64_t *rng);
struct sim_file *sim_disk_find(struct sim_disk *d, const char *path);

/* Faults are read through the pointer at each I/O, so they can change under way. */
struct sim_engine *sim_engine_create(struct sim_disk *d, const struct sim_disk_faults *faults,
                                     uint64_t *now_us, uint64_t seed);
struct fk_engine *sim_engine_base(struct sim_engine *e);
uint64_t sim_engine_next_due(const struct sim_engine *e);       /* UINT64_MAX: nothing */
uint64_t sim_engine_faults_hit(const struct sim_engine *e);     /* since its creation */
/*
 * The process dies: I/O under way is done wholly, partly or not at all, and everything
 * submitted from now on fails without effect.
 */
void sim_engine_kill(struct sim_engine *e);

#endif
