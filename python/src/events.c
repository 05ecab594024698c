/*
 * events.c - flexkv.Events: a subscription to KV events, as lists that fit what engines and routers
 * publish: blocks that follow each other in a prompt go in one tuple.
 */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "flexkv_py.h"

#define AT_ONCE 256

struct events {
    PyObject_HEAD
    struct fkpy_handle handle;
    struct fkpy_node *node;         /* a reference */
    pthread_mutex_t taking;         /* held without running Python code */
};

static struct events *self_of(PyObject *self)
{
    return (struct events *)(void *)self;
}

/* ---- opening and closing ---- */

static void close_object(void *object)
{
    flexkv_events_close(object);
}

PyObject *fkpy_node_events(PyObject *self, PyObject *const *args, Py_ssize_t n_args,
                           PyObject *kwnames)
{
    static const char *const names[] = { "space" };
    static const struct fkpy_signature sig = { "events", names, 0, 1 };
    struct fkpy_state *state = fkpy_state_of(self);
    struct fkpy_space *space = NULL;
    PyObject *arg[FKPY_MAX_ARGS];
    struct fkpy_call c;

    if (!fkpy_arguments(&sig, args, n_args, kwnames, arg))
        return NULL;
    if (arg[0] && arg[0] != Py_None) {
        if (!PyObject_TypeCheck(arg[0], state->space) ||
            (space = (struct fkpy_space *)(void *)arg[0])->node != (void *)self) {
            PyErr_SetString(PyExc_TypeError, "space must be a Space of this node, or None");
            return NULL;
        }
    }
    PyObject *ev = PyType_GenericAlloc(state->events, 0);
    if (!ev)
        return NULL;
    Py_INCREF(self);
    self_of(ev)->node = (struct fkpy_node *)(void *)self;
    pthread_mutex_init(&self_of(ev)->taking, NULL);
    if (!fkpy_node_begin(&c, state, self_of(ev)->node, false)) {
        Py_DECREF(ev);
        return NULL;
    }
    flexkv_events *object;
    int rc = flexkv_events_open(c.handle->object, space ? space->space : NULL, &object);
    fkpy_call_end(&c);
    if (rc) {
        Py_DECREF(ev);
        return fkpy_raise(state, rc);
    }
    struct fkpy_handle *h = &self_of(ev)->handle;
    h->name = "subscription";
    h->close = close_object;
    h->wake_fd = -1;
    fkpy_handle_open(h, object, &state->subscriptions);
    return ev;
}

/* A node that is being closed lets go of its subscriptions: that is waited for. One that is open must
 * not be closed meanwhile. */
static void close_events(PyObject *self)
{
    struct fkpy_handle *node = &self_of(self)->node->handle;
    bool hold = atomic_load(&node->life) == FKPY_OPEN;

    if (hold)
        atomic_fetch_add(&node->users, 1);
    else
        fkpy_handle_close(node);
    fkpy_handle_close(&self_of(self)->handle);
    if (hold)
        atomic_fetch_sub(&node->users, 1);
}

static PyObject *events_close(PyObject *self, PyObject *unused)
{
    close_events(self);
    Py_RETURN_NONE;
}

static void events_dealloc(PyObject *self)
{
    if (self_of(self)->handle.link) {
        close_events(self);
        fkpy_handle_drop(&self_of(self)->handle);
    }
    Py_XDECREF((PyObject *)self_of(self)->node);
    fkpy_free(self);
}

/* On the subscription and on its node: neither is closed meanwhile. */
struct call {
    struct fkpy_call events, node;
};

static bool begin(struct call *c, PyObject *self)
{
    struct fkpy_state *state = fkpy_state_of(self);

    if (!fkpy_call_begin(&c->events, state, &self_of(self)->handle, false))
        return false;
    if (fkpy_node_begin(&c->node, state, self_of(self)->node, false))
        return true;
    fkpy_call_end(&c->events);
    return false;
}

static void end(struct call *c)
{
    fkpy_call_end(&c->node);
    fkpy_call_end(&c->events);
}

static flexkv_events *events_of(const struct call *c)
{
    return c->events.handle->object;
}

/* ---- taking ---- */

/* The tuple that is being made. */
struct group {
    PyObject *list;                 /* of finished tuples */
    PyObject *hashes, *tokens;      /* NULL: none is being made */
    bool stored, root;
    uint8_t medium;
    uint32_t block_size;
    uint64_t parent, last;
    char lora[256], salt[256];
};

static PyObject *text_or_none(const char *text)
{
    if (!*text)
        Py_RETURN_NONE;
    return PyUnicode_DecodeUTF8(text, (Py_ssize_t)strlen(text), "replace");
}

static PyObject *parent_or_none(const struct group *g)
{
    if (!g->stored || g->root)
        Py_RETURN_NONE;
    return PyLong_FromUnsignedLongLong(g->parent);
}

static bool finish_group(struct group *g)
{
    static const char *const media[] = { "", "CPU", "STORAGE", "EXTERNAL" };

    if (!g->hashes)
        return true;
    PyObject *tuple = Py_BuildValue(
        "(NsNNNkNN)", PyBool_FromLong(g->stored), media[g->medium & 3], g->hashes,
        parent_or_none(g), g->tokens, (unsigned long)g->block_size, text_or_none(g->lora),
        text_or_none(g->salt));
    g->hashes = g->tokens = NULL;
    bool ok = tuple && PyList_Append(g->list, tuple) == 0;
    Py_XDECREF(tuple);
    return ok;
}

static bool goes_on(const struct group *g, const flexkv_event *e)
{
    if (!g->hashes || g->stored != (e->kind == FLEXKV_EVENT_STORED) || g->medium != e->medium)
        return false;
    return !g->stored ||
           (!e->root && e->parent == g->last && e->n_tokens == g->block_size &&
            strcmp(g->lora, e->lora_name ? e->lora_name : "") == 0 &&
            strcmp(g->salt, e->cache_salt ? e->cache_salt : "") == 0);
}

static bool begin_group(struct group *g, const flexkv_event *e)
{
    if (!finish_group(g))
        return false;
    g->stored = e->kind == FLEXKV_EVENT_STORED;
    g->root = e->root;
    g->medium = e->medium;
    g->block_size = e->n_tokens;
    g->parent = e->parent;
    PyOS_snprintf(g->lora, sizeof(g->lora), "%s", g->stored && e->lora_name ? e->lora_name : "");
    PyOS_snprintf(g->salt, sizeof(g->salt), "%s", g->stored && e->cache_salt ? e->cache_salt : "");
    g->hashes = PyList_New(0);
    g->tokens = PyList_New(0);
    return g->hashes && g->tokens;
}

static bool append_number(PyObject *list, unsigned long long n)
{
    PyObject *number = PyLong_FromUnsignedLongLong(n);
    bool ok = number && PyList_Append(list, number) == 0;

    Py_XDECREF(number);
    return ok;
}

static bool add_event(struct group *g, const flexkv_event *e)
{
    if (!goes_on(g, e) && !begin_group(g, e))
        return false;
    g->last = e->hash;
    bool ok = append_number(g->hashes, e->hash);
    for (uint32_t i = 0; ok && g->stored && i < e->n_tokens; i++)
        ok = append_number(g->tokens, e->tokens[i]);
    return ok;
}

static void drop_group(struct group *g)
{
    Py_XDECREF(g->hashes);
    Py_XDECREF(g->tokens);
    Py_XDECREF(g->list);
}

/* Another thread's call ends what the events point to: their tokens are copied into *tokens, to be freed.
 * Runs no Python code. How many; -errno. */
static int take_copies(flexkv_events *events, pthread_mutex_t *taking, flexkv_event *e, int max,
                       uint32_t **tokens)
{
    size_t all = 0, at = 0;

    pthread_mutex_lock(taking);
    int n = flexkv_events_take(events, e, (size_t)(max < AT_ONCE ? max : AT_ONCE));
    for (int i = 0; i < n; i++)
        all += e[i].n_tokens;
    *tokens = malloc((all + 1) * sizeof(**tokens));
    if (!*tokens && n > 0) {
        flexkv_events_again(events);
        n = -ENOMEM;
    }
    for (int i = 0; i < n; i++) {
        if (e[i].n_tokens)
            memcpy(*tokens + at, e[i].tokens, e[i].n_tokens * sizeof(**tokens));
        e[i].tokens = *tokens + at;
        at += e[i].n_tokens;
    }
    pthread_mutex_unlock(taking);
    return n;
}

/* Up to AT_ONCE events into the list. How many; -errno; with an exception what was taken is lost, so
 * that the next take announces all anew. */
static int take_some(PyObject *self, struct group *g, int max)
{
    flexkv_event e[AT_ONCE];
    uint32_t *tokens = NULL;
    struct call c;

    if (!begin(&c, self))
        return 0;
    int n = take_copies(events_of(&c), &self_of(self)->taking, e, max, &tokens);
    PyThreadState *thread = c.node.thread;
    if (thread) {
        PyEval_RestoreThread(thread);
        c.node.thread = NULL;
    }
    for (int i = 0; i < n && !PyErr_Occurred(); i++)
        if (!add_event(g, &e[i]))
            flexkv_events_again(events_of(&c));
    free(tokens);
    end(&c);
    return n;
}

static PyObject *events_take(PyObject *self, PyObject *const *args, Py_ssize_t n_args,
                             PyObject *kwnames)
{
    static const char *const names[] = { "max_blocks" };
    static const struct fkpy_signature sig = { "take", names, 0, 1 };
    PyObject *arg[FKPY_MAX_ARGS];
    int left = 4096, n;

    if (!fkpy_arguments(&sig, args, n_args, kwnames, arg) ||
        !fkpy_int(arg[0], "max_blocks", 1, &left))
        return NULL;
    struct group g = { .list = PyList_New(0) };
    if (!g.list)
        return NULL;
    do {
        n = take_some(self, &g, left);
        left -= n;
    } while (n > 0 && left > 0 && !PyErr_Occurred());
    if (PyErr_Occurred() || !finish_group(&g)) {
        drop_group(&g);
        return NULL;
    }
    if (n < 0 && PyList_Size(g.list) == 0) {        /* else it is told the next time */
        drop_group(&g);
        return fkpy_raise(fkpy_state_of(self), n);
    }
    return g.list;
}

static PyObject *events_again(PyObject *self, PyObject *unused)
{
    struct call c;

    if (!begin(&c, self))
        return NULL;
    int rc = flexkv_events_again(events_of(&c));
    end(&c);
    if (rc)
        return fkpy_raise(fkpy_state_of(self), rc);
    Py_RETURN_NONE;
}

static PyObject *events_fileno(PyObject *self, PyObject *unused)
{
    struct call c;

    if (!begin(&c, self))
        return NULL;
    int fd = flexkv_events_fd(events_of(&c));
    end(&c);
    return PyLong_FromLong(fd);
}

static PyMethodDef methods[] = {
    { "take", FKPY_FASTCALL(events_take),
      "take(max_blocks=4096): what is new, as tuples (stored, medium, hashes, parent, token_ids, "
      "block_size, lora_name, cache_salt); [] when there is nothing. Does not wait." },
    { "again", events_again, METH_NOARGS,
      "The receiver has forgotten everything: what is there is announced anew." },
    { "fileno", events_fileno, METH_NOARGS,
      "A descriptor that is readable when there may be something to take." },
    { "close", events_close, METH_NOARGS, "Ends the subscription. May be repeated." },
    { 0 },
};

static PyType_Slot slots[] = {
    { Py_tp_doc, "A subscription to KV events. Made by Node.events." },
    { Py_tp_dealloc, events_dealloc },
    { Py_tp_methods, methods },
    { 0 },
};
PyType_Spec fkpy_events_spec = {
    "flexkv.Events", sizeof(struct events), 0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, slots,
};
