/*
 * flexkv_py.h - what the files of the extension module flexkv._flexkv share.
 *
 * The module is a thin layer over flexkv.h: it turns arguments into C, calls, turns results into
 * Python objects, and adds what C leaves to the caller:
 *   - an object may be closed while other threads use it: close waits for their calls (handle.c);
 *   - after fork() the objects in the child refuse to work, and are never closed there;
 *   - what is still open when the interpreter ends is closed before its memory goes away.
 *
 * Only the limited API of Python 3.11 is used. Unless said otherwise a function needs the GIL;
 * those that return bool or PyObject * have set an exception when they return false or NULL.
 */
#ifndef FLEXKV_PY_H
#define FLEXKV_PY_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "flexkv/flexkv.h"

#define KEY_BYTES ((Py_ssize_t)sizeof(flexkv_key))

/* ---- the module -------------------------------------------------------------------------- */

struct fkpy_state {
    PyObject *error;                /* flexkv.Error */
    PyTypeObject *completion, *match;
    PyTypeObject *config, *node, *space, *ns, *agent, *events;
    struct fkpy_handle *agents, *subscriptions, *nodes;     /* open ones, to be closed at exit */
};

/* Of an instance of one of the module's types. */
struct fkpy_state *fkpy_state_of(PyObject *self);
/* flexkv.Error from -errno and flexkv_last_error(); returns NULL. */
PyObject *fkpy_raise(struct fkpy_state *state, int rc);
PyObject *fkpy_raise_text(struct fkpy_state *state, int error, const char *text);

/* A struct sequence of new references, which it takes; NULL if one of them could not be made. */
PyObject *fkpy_record(PyTypeObject *type, PyObject **fields, Py_ssize_t n);

extern PyType_Spec fkpy_config_spec, fkpy_node_spec, fkpy_space_spec, fkpy_namespace_spec,
                   fkpy_agent_spec, fkpy_events_spec;

/* ---- handle.c: the life of a node or an agent --------------------------------------------- */

enum fkpy_life { FKPY_CLOSED, FKPY_OPEN, FKPY_CLOSING };

struct fkpy_handle {
    void *object;                   /* flexkv_node or flexkv_agent */
    void (*close)(void *object);
    const char *name;               /* for messages */
    int wake_fd;                    /* readable once closing has begun; -1: nobody waits */
    unsigned fork_count;            /* of the process that opened it */
    _Atomic unsigned users;         /* calls under way */
    _Atomic int life;
    struct fkpy_handle *next, **link;
};

/* Once, when the module is loaded. */
int fkpy_handles_init(void);
/* The object belongs to the handle from now on; list: where closing at exit finds it. */
void fkpy_handle_open(struct fkpy_handle *h, void *object, struct fkpy_handle **list);
/* Waits for calls under way, then closes; what is closed already is left alone. */
void fkpy_handle_close(struct fkpy_handle *h);
/* The same when its object is collected. */
void fkpy_handle_drop(struct fkpy_handle *h);
void fkpy_handles_close_all(struct fkpy_state *state);

/* One call into the library, between begin and end. */
struct fkpy_call {
    struct fkpy_handle *handle;
    PyThreadState *thread;          /* NULL: the GIL is kept */
};
/* Error(EBADF) if the handle is closed. release_gil: for calls that may take time. */
bool fkpy_call_begin(struct fkpy_call *c, struct fkpy_state *state, struct fkpy_handle *h,
                     bool release_gil);
void fkpy_call_end(struct fkpy_call *c);

/* ---- objects ------------------------------------------------------------------------------- */

struct fkpy_node {
    PyObject_HEAD
    struct fkpy_handle handle;
    bool remote;                    /* served by a daemon: every call may be a round trip */
};

struct fkpy_config {
    PyObject_HEAD
    flexkv_config *config;
    bool busy;                      /* a node is being opened with it, without the GIL */
};

struct fkpy_space {
    PyObject_HEAD
    struct fkpy_node *node;         /* a reference */
    flexkv_space *space;
    PyObject *name;
    uint32_t tokens_per_block;
};

/* node.c: a call on the node of a Node, Space or Namespace. release_gil: also in this process. */
bool fkpy_node_begin(struct fkpy_call *c, struct fkpy_state *state, struct fkpy_node *node,
                     bool release_gil);
/* stats.c */
PyObject *fkpy_stats_dict(const flexkv_stats *stats);
/* events.c: Node.events. space.c: Node.space. namespace.c: Space.namespace. */
PyObject *fkpy_node_events(PyObject *self, PyObject *const *args, Py_ssize_t n_args,
                           PyObject *kwnames);
PyObject *fkpy_node_space(PyObject *self, PyObject *args, PyObject *kw);
PyObject *fkpy_space_namespace(PyObject *self, PyObject *parts);
/* Drops an instance and its reference to the type, after what it held has been let go. */
void fkpy_free(PyObject *self);

/* ---- args.c: what a call was given ----------------------------------------------------------- */

/* For the calls of each request, where PyArg_Parse* would cost more than the call. */
struct fkpy_signature {
    const char *function;
    const char *const *names;
    Py_ssize_t required, total;
};
#define FKPY_MAX_ARGS 8
/* Sorts positional and keyword arguments into out, borrowed; NULL where none was given. */
bool fkpy_arguments(const struct fkpy_signature *sig, PyObject *const *args, Py_ssize_t n,
                    PyObject *kwnames, PyObject *out[FKPY_MAX_ARGS]);
#define FKPY_FASTCALL(f) ((PyCFunction)(void (*)(void))(f)), METH_FASTCALL | METH_KEYWORDS
#define FKPY_KEYWORDS(f) ((PyCFunction)(void (*)(void))(f)), METH_VARARGS | METH_KEYWORDS

/* Integers in a range; ValueError names what. NULL leaves *out alone. */
bool fkpy_u64(PyObject *o, const char *what, uint64_t *out);
bool fkpy_u32(PyObject *o, const char *what, uint32_t *out);
bool fkpy_int(PyObject *o, const char *what, int min, int *out);

/* Room that is on the stack unless much is needed. */
struct fkpy_room {
    void *data;
    _Alignas(16) char small[8192];
};
bool fkpy_room_take(struct fkpy_room *room, size_t bytes);
void fkpy_room_free(struct fkpy_room *room);

/* A list of int or a buffer of integers as uint32; what: "pages", "tokens". Data in room. */
bool fkpy_u32s(PyObject *o, const char *what, struct fkpy_room *room, size_t *n);
bool fkpy_u64s(PyObject *o, const char *what, struct fkpy_room *room, size_t *n);
/* What an engine calls its blocks, as 64 bits: of an int the lowest, of bytes the last 8 (big-endian).
 * hashes: a list of those, or a buffer of 8-byte integers. */
bool fkpy_event_hash(PyObject *o, const char *what, uint64_t *out);
bool fkpy_event_hashes(PyObject *o, struct fkpy_room *room, size_t *n);
/* Hashes of one length side by side. */
bool fkpy_hashes(PyObject *o, struct fkpy_room *room, size_t *hash_bytes, size_t *n);
/* Whole keys; *keys points into the object if that is bytes, else into room. */
bool fkpy_keys(PyObject *o, struct fkpy_room *room, const flexkv_key **keys, uint32_t *n);
/* (base, stride, page bytes, pages), ... */
bool fkpy_regions(PyObject *o, struct fkpy_room *room, size_t *n);

#endif
