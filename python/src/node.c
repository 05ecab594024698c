/*
 * node.c - flexkv.Node: a node in this process, or a daemon's. Its life is in handle.c, its
 * statistics are in stats.c, spaces in space.c.
 *
 * Calls that take microseconds (match, get, put, poll without waiting, ...) keep the GIL on a node
 * in this process: whoever gives it up waits up to 5 ms to get it back, when another Python thread
 * computes. A daemon's node answers over a round trip, so there they give it up.
 */
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "flexkv_py.h"

bool fkpy_node_begin(struct fkpy_call *c, struct fkpy_state *state, struct fkpy_node *node,
                     bool release_gil)
{
    return fkpy_call_begin(c, state, &node->handle, release_gil || node->remote);
}

static struct fkpy_node *self_of(PyObject *self)
{
    return (struct fkpy_node *)(void *)self;
}

static bool begin(struct fkpy_call *c, PyObject *self, bool release_gil)
{
    return fkpy_node_begin(c, fkpy_state_of(self), self_of(self), release_gil);
}

static flexkv_node *node_of(const struct fkpy_call *c)
{
    return c->handle->object;
}

static PyObject *none_or_error(PyObject *self, int rc)
{
    if (rc)
        return fkpy_raise(fkpy_state_of(self), rc);
    Py_RETURN_NONE;
}

/* ---- opening and closing ---- */

static void close_object(void *object)
{
    flexkv_node_close(object);
}

static PyObject *new_node(PyTypeObject *type, flexkv_node *object, bool remote)
{
    struct fkpy_state *state = PyType_GetModuleState(type);
    PyObject *self = PyType_GenericAlloc(type, 0);
    int wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);

    if (!self || wake_fd < 0) {
        int error = errno;
        if (wake_fd >= 0)
            close(wake_fd);
        flexkv_node_close(object);
        if (!self)
            return NULL;
        Py_DECREF(self);
        return fkpy_raise_text(state, error, "no descriptor for an eventfd is left");
    }
    struct fkpy_node *node = self_of(self);
    node->remote = remote;
    node->handle.name = "node";
    node->handle.close = close_object;
    node->handle.wake_fd = wake_fd;
    fkpy_handle_open(&node->handle, object, &state->nodes);
    return self;
}

/* address NULL: in this process. */
static PyObject *open_or_connect(PyObject *cls, const char *address, PyObject *config)
{
    struct fkpy_state *state = PyType_GetModuleState((PyTypeObject *)(void *)cls);
    struct fkpy_config *given = NULL;
    flexkv_node *object;
    int rc;

    if (config && config != Py_None) {
        if (!PyObject_TypeCheck(config, state->config)) {
            PyErr_Format(PyExc_TypeError, "config must be a flexkv.Config or None, not %R",
                         Py_TYPE(config));
            return NULL;
        }
        given = (struct fkpy_config *)(void *)config;
        if (given->busy)
            return fkpy_raise_text(state, EBUSY, "a node is being opened with this config");
        given->busy = true;
    }
    flexkv_config *c = given ? given->config : NULL;
    Py_BEGIN_ALLOW_THREADS
    rc = address ? flexkv_node_connect(c, address, &object) : flexkv_node_open(c, &object);
    Py_END_ALLOW_THREADS
    if (given)
        given->busy = false;
    if (rc)
        return fkpy_raise(state, rc);
    return new_node((PyTypeObject *)(void *)cls, object, address != NULL);
}

static PyObject *node_open(PyObject *cls, PyObject *args, PyObject *kw)
{
    static char *names[] = { "config", NULL };
    PyObject *config = NULL;

    if (!PyArg_ParseTupleAndKeywords(args, kw, "|O:open", names, &config))
        return NULL;
    return open_or_connect(cls, NULL, config);
}

static PyObject *node_connect(PyObject *cls, PyObject *args, PyObject *kw)
{
    static char *names[] = { "address", "config", NULL };
    PyObject *config = NULL;
    const char *address;

    if (!PyArg_ParseTupleAndKeywords(args, kw, "s|O:connect", names, &address, &config))
        return NULL;
    return open_or_connect(cls, address, config);
}

static PyObject *node_close(PyObject *self, PyObject *unused)
{
    fkpy_handle_close(&self_of(self)->handle);
    Py_RETURN_NONE;
}

static void node_dealloc(PyObject *self)
{
    fkpy_handle_drop(&self_of(self)->handle);
    fkpy_free(self);
}

static PyObject *node_enter(PyObject *self, PyObject *unused)
{
    Py_INCREF(self);
    return self;
}

static PyObject *node_exit(PyObject *self, PyObject *args)
{
    return node_close(self, NULL);
}

/* ---- addresses ---- */

static PyObject *listen_or_serve(PyObject *self, PyObject *args, PyObject *kw,
                                 int (*call)(flexkv_node *, const char *))
{
    static char *names[] = { "address", NULL };
    const char *address;
    struct fkpy_call c;

    if (!PyArg_ParseTupleAndKeywords(args, kw, "s", names, &address) ||
        !begin(&c, self, true))
        return NULL;
    int rc = call(node_of(&c), address);
    fkpy_call_end(&c);
    return none_or_error(self, rc);
}

static PyObject *node_listen(PyObject *self, PyObject *args, PyObject *kw)
{
    return listen_or_serve(self, args, kw, flexkv_node_listen);
}

static PyObject *node_serve(PyObject *self, PyObject *args, PyObject *kw)
{
    return listen_or_serve(self, args, kw, flexkv_node_serve);
}

/* ---- waiting: Ctrl-C and close() end it ---- */

static int64_t now_ms(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (int64_t)ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

/* What is left until end, at most `longest`; end < 0: no limit. */
static int left_ms(int64_t end, int longest)
{
    int64_t left = end < 0 ? longest : end - now_ms();

    return left < 0 ? 0 : left < longest ? (int)left : longest;
}

static PyObject *node_wait_idle(PyObject *self, PyObject *args, PyObject *kw)
{
    static char *names[] = { "idle_ms", "timeout_ms", NULL };
    enum { SLICE_MS = 200 };        /* between looks at signals and close() */
    PyObject *idle_arg, *timeout_arg = NULL;
    int idle_ms = 0, timeout_ms = -1, rc;

    if (!PyArg_ParseTupleAndKeywords(args, kw, "O|O:wait_idle", names, &idle_arg, &timeout_arg) ||
        !fkpy_int(idle_arg, "idle_ms", 0, &idle_ms) ||
        !fkpy_int(timeout_arg, "timeout_ms", -1, &timeout_ms))
        return NULL;
    int64_t end = timeout_ms < 0 ? -1 : now_ms() + timeout_ms;
    do {
        struct fkpy_call c;
        if (PyErr_CheckSignals() || !begin(&c, self, true))
            return NULL;
        rc = flexkv_node_wait_idle(node_of(&c), idle_ms, left_ms(end, SLICE_MS));
        fkpy_call_end(&c);
    } while (rc == 0 && (end < 0 || now_ms() < end));
    return rc < 0 ? fkpy_raise(fkpy_state_of(self), rc) : PyBool_FromLong(rc);
}

/* Until there are completions, the node is closed, a signal comes, or the time is up. */
static void wait_for_completions(const struct fkpy_handle *h, int64_t end)
{
    struct pollfd fds[2] = {
        { .fd = flexkv_node_fd(h->object), .events = POLLIN },
        { .fd = h->wake_fd, .events = POLLIN },
    };

    poll(fds, 2, end < 0 ? -1 : left_ms(end, INT32_MAX));
}

static PyObject *completion_list(struct fkpy_state *state, const flexkv_completion *list, int n)
{
    PyObject *all = PyList_New(n);

    for (int i = 0; all && i < n; i++) {
        const flexkv_completion *c = &list[i];
        PyObject *fields[] = {
            PyLong_FromUnsignedLongLong(c->op), PyLong_FromUnsignedLong(c->kind),
            PyLong_FromLong(c->status), PyLong_FromUnsignedLong(c->blocks),
            PyLong_FromUnsignedLong(c->blocks_ok), PyLong_FromUnsignedLong(c->flags),
        };
        PyObject *one = fkpy_record(state->completion, fields, 6);
        if (!one || PyList_SetItem(all, i, one) != 0) {
            Py_DECREF(all);
            return NULL;
        }
    }
    return all;
}

static PyObject *node_poll(PyObject *self, PyObject *const *args, Py_ssize_t n_args,
                           PyObject *kwnames)
{
    static const char *const names[] = { "max", "timeout_ms" };
    static const struct fkpy_signature sig = { "poll", names, 0, 2 };
    enum { AT_ONCE = 256 };
    flexkv_completion list[AT_ONCE];
    PyObject *arg[FKPY_MAX_ARGS];
    int max = AT_ONCE, timeout_ms = 0;

    if (!fkpy_arguments(&sig, args, n_args, kwnames, arg) || !fkpy_int(arg[0], "max", 1, &max) ||
        !fkpy_int(arg[1], "timeout_ms", -1, &timeout_ms))
        return NULL;
    int64_t end = timeout_ms < 0 ? -1 : timeout_ms ? now_ms() + timeout_ms : 0;
    for (bool wait = false;; wait = true) {
        struct fkpy_call c;
        if (!begin(&c, self, wait))
            return NULL;
        if (wait)
            wait_for_completions(c.handle, end);
        int n = flexkv_poll(node_of(&c), list, max < AT_ONCE ? max : AT_ONCE, 0);
        fkpy_call_end(&c);
        if (n < 0)
            return fkpy_raise(fkpy_state_of(self), n);
        if (n || timeout_ms == 0 || (end >= 0 && now_ms() >= end))
            return completion_list(fkpy_state_of(self), list, n);
        if (PyErr_CheckSignals())
            return NULL;
    }
}

/* ---- operations ---- */

static PyObject *node_get(PyObject *self, PyObject *const *args, Py_ssize_t n_args,
                          PyObject *kwnames)
{
    static const char *const names[] = { "lease", "first", "pages", "timeout_ms", "layerwise",
                                         "counter", "early" };
    static const struct fkpy_signature sig = { "get", names, 3, 7 };
    PyObject *arg[FKPY_MAX_ARGS];
    struct fkpy_room pages;
    struct fkpy_call c;
    uint64_t lease, op;
    uint32_t first, timeout_ms = 0, counter = 0;
    int layerwise = 0, early = 0;
    size_t n;

    if (!fkpy_arguments(&sig, args, n_args, kwnames, arg) || !fkpy_u64(arg[0], "lease", &lease) ||
        (arg[4] && (layerwise = PyObject_IsTrue(arg[4])) < 0) || (arg[6] && (early = PyObject_IsTrue(arg[6])) < 0) ||
        !fkpy_u32(arg[1], "first", &first) || !fkpy_u32(arg[3], "timeout_ms", &timeout_ms) ||
        !fkpy_u32(arg[5], "counter", &counter) || !fkpy_u32s(arg[2], "pages", &pages, &n))
        return NULL;
    if (!begin(&c, self, false)) {
        fkpy_room_free(&pages);
        return NULL;
    }
    flexkv_op_args op_args = { .struct_bytes = sizeof(op_args), .pages = pages.data,
                               .timeout_ms = timeout_ms,
                               .flags = (layerwise ? FLEXKV_OP_LAYERWISE : 0) | (early ? FLEXKV_OP_EARLY : 0),
                               .counter = counter };
    int rc = flexkv_get(node_of(&c), lease, first, (uint32_t)n, &op_args, &op);
    fkpy_call_end(&c);
    fkpy_room_free(&pages);
    return rc ? fkpy_raise(fkpy_state_of(self), rc) : PyLong_FromUnsignedLongLong(op);
}

static PyObject *node_release(PyObject *self, PyObject *const *args, Py_ssize_t n_args,
                              PyObject *kwnames)
{
    static const char *const names[] = { "lease" };
    static const struct fkpy_signature sig = { "release", names, 1, 1 };
    PyObject *arg[FKPY_MAX_ARGS];
    struct fkpy_call c;
    uint64_t lease;

    if (!fkpy_arguments(&sig, args, n_args, kwnames, arg) || !fkpy_u64(arg[0], "lease", &lease) ||
        !begin(&c, self, false))
        return NULL;
    int rc = flexkv_release(node_of(&c), lease);
    fkpy_call_end(&c);
    return none_or_error(self, rc);
}

static PyObject *node_cancel(PyObject *self, PyObject *const *args, Py_ssize_t n_args,
                             PyObject *kwnames)
{
    static const char *const names[] = { "op" };
    static const struct fkpy_signature sig = { "cancel", names, 1, 1 };
    PyObject *arg[FKPY_MAX_ARGS];
    struct fkpy_call c;
    uint64_t op;

    if (!fkpy_arguments(&sig, args, n_args, kwnames, arg) || !fkpy_u64(arg[0], "op", &op) ||
        !begin(&c, self, false))
        return NULL;
    int rc = flexkv_cancel(node_of(&c), op);
    fkpy_call_end(&c);
    if (rc && rc != -ENOENT)
        return fkpy_raise(fkpy_state_of(self), rc);
    return PyBool_FromLong(rc == 0);
}

static PyObject *node_reset(PyObject *self, PyObject *unused)
{
    struct fkpy_call c;

    if (!begin(&c, self, true))
        return NULL;
    int rc = flexkv_reset(node_of(&c));
    fkpy_call_end(&c);
    return none_or_error(self, rc);
}

/* ---- the node itself ---- */

static PyObject *node_stats(PyObject *self, PyObject *unused)
{
    flexkv_stats stats = { .struct_bytes = sizeof(stats) };
    struct fkpy_call c;

    if (!begin(&c, self, true))
        return NULL;
    int rc = flexkv_node_stats(node_of(&c), &stats);
    fkpy_call_end(&c);
    return rc ? fkpy_raise(fkpy_state_of(self), rc) : fkpy_stats_dict(&stats);
}

static PyObject *node_status(PyObject *self, PyObject *unused)
{
    struct fkpy_call c;
    char *json = NULL;

    if (!begin(&c, self, true))
        return NULL;
    int rc = flexkv_node_status(node_of(&c), &json);
    fkpy_call_end(&c);
    if (rc)
        return fkpy_raise(fkpy_state_of(self), rc);
    PyObject *text = PyUnicode_DecodeUTF8(json, (Py_ssize_t)strlen(json), "replace");
    free(json);
    return text;
}

static PyObject *node_fileno(PyObject *self, PyObject *unused)
{
    struct fkpy_call c;

    if (!begin(&c, self, false))
        return NULL;
    int fd = flexkv_node_fd(node_of(&c));
    fkpy_call_end(&c);
    return fd < 0 ? fkpy_raise(fkpy_state_of(self), fd) : PyLong_FromLong(fd);
}

static PyObject *node_closed(PyObject *self, void *unused)
{
    return PyBool_FromLong(atomic_load(&self_of(self)->handle.life) != FKPY_OPEN);
}

static PyMethodDef methods[] = {
    { "open", FKPY_KEYWORDS(node_open) | METH_CLASS,
      "open(config=None): a node in this process." },
    { "connect", FKPY_KEYWORDS(node_connect) | METH_CLASS,
      "connect(address, config=None): the node that a daemon serves." },
    { "listen", FKPY_KEYWORDS(node_listen), "listen(address): lets agents register there." },
    { "serve", FKPY_KEYWORDS(node_serve),
      "serve(address): the same for clients, as a daemon does." },
    { "wait_idle", FKPY_KEYWORDS(node_wait_idle),
      "wait_idle(idle_ms, timeout_ms=-1): True once the node has had no client for so long." },
    { "space", FKPY_KEYWORDS(fkpy_node_space),
      "space(name=None, *, tokens_per_block, ...): a Space; waits for its workers' agents." },
    { "events", FKPY_FASTCALL(fkpy_node_events),
      "events(space=None): a subscription to KV events, of one space or of all." },
    { "release", FKPY_FASTCALL(node_release), "release(lease): gives it back unused." },
    { "get", FKPY_FASTCALL(node_get),
      "get(lease, first, pages, timeout_ms=0, layerwise=False, counter=0): starts a get; its operation's "
      "number." },
    { "cancel", FKPY_FASTCALL(node_cancel), "cancel(op): False: it has ended already." },
    { "poll", FKPY_FASTCALL(node_poll),
      "poll(max=256, timeout_ms=0): completions; waits for the first one (-1: no limit)." },
    { "reset", node_reset, METH_NOARGS, "Drops every block of every tier, of all spaces." },
    { "stats", node_stats, METH_NOARGS, "Counters since open; names as in flexkv_stats." },
    { "status", node_status, METH_NOARGS, "What `flexkv status --json` prints." },
    { "fileno", node_fileno, METH_NOARGS, "A descriptor that is readable while completions wait." },
    { "close", node_close, METH_NOARGS, "Ends operations, keeps what is on SSD. May be repeated." },
    { "__enter__", node_enter, METH_NOARGS, NULL },
    { "__exit__", node_exit, METH_VARARGS, NULL },
    { 0 },
};

static PyGetSetDef properties[] = {
    { "closed", node_closed, NULL, "whether close() was called", NULL },
    { 0 },
};

static PyType_Slot slots[] = {
    { Py_tp_doc, "A node: index and tiers. Made by Node.open or Node.connect." },
    { Py_tp_dealloc, node_dealloc },
    { Py_tp_methods, methods },
    { Py_tp_getset, properties },
    { 0 },
};
PyType_Spec fkpy_node_spec = {
    "flexkv.Node", sizeof(struct fkpy_node), 0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, slots,
};
