/* space.c - flexkv.Space: one KV geometry on a node, and the engine memory of this process. */
#include <string.h>

#include "flexkv_py.h"

static struct fkpy_space *self_of(PyObject *self)
{
    return (struct fkpy_space *)(void *)self;
}

static bool begin(struct fkpy_call *c, PyObject *self, bool release_gil)
{
    return fkpy_node_begin(c, fkpy_state_of(self), self_of(self)->node, release_gil);
}

static PyObject *none_or_error(PyObject *self, int rc)
{
    if (rc)
        return fkpy_raise(fkpy_state_of(self), rc);
    Py_RETURN_NONE;
}

/* ---- opening ---- */

static PyObject *new_space(struct fkpy_state *state, PyObject *node, flexkv_space *space,
                           const flexkv_space_desc *desc)
{
    PyObject *name = PyUnicode_FromString(desc->name ? desc->name : "default");
    PyObject *self = name ? PyType_GenericAlloc(state->space, 0) : NULL;

    if (!self) {
        Py_XDECREF(name);
        return NULL;
    }
    Py_INCREF(node);
    self_of(self)->node = (struct fkpy_node *)(void *)node;
    self_of(self)->space = space;
    self_of(self)->name = name;
    self_of(self)->tokens_per_block = desc->tokens_per_block;
    return self;
}

static bool fill_desc(flexkv_space_desc *desc, PyObject *args, PyObject *kw)
{
    static char *names[] = { "name", "fingerprint", "tokens_per_block", "ranks", "slice_bytes",
                             "instance", "workers", "wait_ms", NULL };
    PyObject *tokens_per_block = NULL, *ranks = NULL, *slice_bytes = NULL, *workers = NULL,
             *wait_ms = NULL;
    Py_ssize_t fingerprint_bytes = 0;
    const char *fingerprint = NULL;

    if (!PyArg_ParseTupleAndKeywords(args, kw, "|z$y#OOOsOO:space", names, &desc->name,
                                     &fingerprint, &fingerprint_bytes, &tokens_per_block, &ranks,
                                     &slice_bytes, &desc->instance, &workers, &wait_ms))
        return false;
    if (!tokens_per_block) {
        PyErr_SetString(PyExc_TypeError, "space() is missing the argument 'tokens_per_block'");
        return false;
    }
    desc->fingerprint = fingerprint;
    desc->fingerprint_bytes = (size_t)fingerprint_bytes;
    return fkpy_u32(tokens_per_block, "tokens_per_block", &desc->tokens_per_block) &&
           fkpy_u32(ranks, "ranks", &desc->ranks) &&
           fkpy_u64(slice_bytes, "slice_bytes", &desc->slice_bytes) &&
           fkpy_u32(workers, "workers", &desc->workers) &&
           fkpy_u32(wait_ms, "wait_ms", &desc->wait_ms);
}

PyObject *fkpy_node_space(PyObject *self, PyObject *args, PyObject *kw)
{
    flexkv_space_desc desc = { .struct_bytes = sizeof(desc), .ranks = 1 };
    struct fkpy_state *state = fkpy_state_of(self);
    flexkv_space *space;
    struct fkpy_call c;

    if (!fill_desc(&desc, args, kw) ||
        !fkpy_node_begin(&c, state, (struct fkpy_node *)(void *)self, true))
        return NULL;
    int rc = flexkv_space_open(c.handle->object, &desc, &space);
    fkpy_call_end(&c);
    return rc ? fkpy_raise(state, rc) : new_space(state, self, space, &desc);
}

static void space_dealloc(PyObject *self)
{
    Py_XDECREF(self_of(self)->name);
    Py_XDECREF((PyObject *)self_of(self)->node);
    fkpy_free(self);
}

/* ---- engine memory in this process ---- */

static PyObject *space_register(PyObject *self, PyObject *args, PyObject *kw)
{
    static char *names[] = { "rank", "regions", NULL };
    PyObject *rank_arg, *regions_arg;
    struct fkpy_room regions;
    struct fkpy_call c;
    uint32_t rank;
    size_t n;

    if (!PyArg_ParseTupleAndKeywords(args, kw, "OO:register", names, &rank_arg, &regions_arg) ||
        !fkpy_u32(rank_arg, "rank", &rank) || !fkpy_regions(regions_arg, &regions, &n))
        return NULL;
    if (!begin(&c, self, true)) {
        fkpy_room_free(&regions);
        return NULL;
    }
    int rc = flexkv_regions_register(self_of(self)->space, rank, regions.data, n);
    fkpy_call_end(&c);
    fkpy_room_free(&regions);
    return none_or_error(self, rc);
}

static PyObject *space_unregister(PyObject *self, PyObject *args, PyObject *kw)
{
    static char *names[] = { "rank", NULL };
    PyObject *rank_arg;
    struct fkpy_call c;
    uint32_t rank;

    if (!PyArg_ParseTupleAndKeywords(args, kw, "O:unregister", names, &rank_arg) ||
        !fkpy_u32(rank_arg, "rank", &rank) || !begin(&c, self, true))
        return NULL;
    int rc = flexkv_regions_unregister(self_of(self)->space, rank);
    fkpy_call_end(&c);
    return none_or_error(self, rc);
}

static PyObject *space_set_compute_rate(PyObject *self, PyObject *args, PyObject *kw)
{
    static char *names[] = { "tokens_per_second", NULL };
    struct fkpy_call c;
    double rate;

    if (!PyArg_ParseTupleAndKeywords(args, kw, "d:set_compute_rate", names, &rate) ||
        !begin(&c, self, false))
        return NULL;
    int rc = flexkv_space_set_compute_rate(self_of(self)->space, rate);
    fkpy_call_end(&c);
    return none_or_error(self, rc);
}

/* ---- the type ---- */

static PyObject *get_name(PyObject *self, void *unused)
{
    Py_INCREF(self_of(self)->name);
    return self_of(self)->name;
}

static PyObject *get_tokens_per_block(PyObject *self, void *unused)
{
    return PyLong_FromUnsignedLong(self_of(self)->tokens_per_block);
}

static PyGetSetDef properties[] = {
    { "name", get_name, NULL, "name of the space", NULL },
    { "tokens_per_block", get_tokens_per_block, NULL, "tokens of a block", NULL },
    { 0 },
};

static PyMethodDef methods[] = {
    { "namespace", fkpy_space_namespace, METH_VARARGS,
      "namespace(*parts): the Namespace of that name; without parts the default one." },
    { "register", FKPY_KEYWORDS(space_register),
      "register(rank, regions): pages of a rank in this process; regions: (base address, stride, "
      "page bytes, pages), ..." },
    { "unregister", FKPY_KEYWORDS(space_unregister),
      "unregister(rank): waits until no copy touches the memory any more." },
    { "set_compute_rate", FKPY_KEYWORDS(space_set_compute_rate),
      "set_compute_rate(tokens_per_second): with it, hits slower than computing are declined." },
    { 0 },
};

static PyType_Slot slots[] = {
    { Py_tp_doc, "One KV geometry. Made by Node.space." },
    { Py_tp_dealloc, space_dealloc },
    { Py_tp_methods, methods },
    { Py_tp_getset, properties },
    { 0 },
};
PyType_Spec fkpy_space_spec = {
    "flexkv.Space", sizeof(struct fkpy_space), 0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, slots,
};
