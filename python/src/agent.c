/* agent.c - flexkv.Agent: the data mover of a worker process. Its life is in handle.c. */
#include <string.h>

#include "flexkv_py.h"

struct agent {
    PyObject_HEAD
    struct fkpy_handle handle;
};

static struct agent *self_of(PyObject *self)
{
    return (struct agent *)(void *)self;
}

static void close_object(void *object)
{
    flexkv_agent_close(object);
}

/* ---- starting and closing ---- */

static bool fill_desc(flexkv_agent_desc *desc, PyObject **regions, PyObject **layers, PyObject *args,
                      PyObject *kw)
{
    static char *names[] = { "address", "regions", "space", "instance", "worker", "slice",
                             "replica", "replicas", "timeout_ms", "layers", NULL };
    PyObject *worker = NULL, *slice = NULL, *replica = NULL, *replicas = NULL, *timeout_ms = NULL;

    return PyArg_ParseTupleAndKeywords(args, kw, "sO|$zsOOOOOO:Agent", names, &desc->address,
                                       regions, &desc->space, &desc->instance, &worker, &slice,
                                       &replica, &replicas, &timeout_ms, layers) &&
           fkpy_u32(worker, "worker", &desc->worker) && fkpy_u32(slice, "slice", &desc->slice) &&
           fkpy_u32(replica, "replica", &desc->replica) &&
           fkpy_u32(replicas, "replicas", &desc->replicas) &&
           fkpy_u32(timeout_ms, "timeout_ms", &desc->timeout_ms);
}

static PyObject *agent_new(PyTypeObject *type, PyObject *args, PyObject *kw)
{
    flexkv_agent_desc desc = { .struct_bytes = sizeof(desc), .replicas = 1 };
    struct fkpy_state *state = PyType_GetModuleState(type);
    struct fkpy_room regions, layers = { 0 };
    PyObject *regions_arg, *layers_arg = NULL;
    flexkv_agent *object;
    size_t n, n_layers = 0;
    int rc;

    if (!fill_desc(&desc, &regions_arg, &layers_arg, args, kw) ||
        !fkpy_regions(regions_arg, &regions, &n))
        return NULL;
    bool ok = !layers_arg || layers_arg == Py_None ||
              fkpy_u32s(layers_arg, "layers", &layers, &n_layers);
    PyObject *self = ok ? PyType_GenericAlloc(type, 0) : NULL;
    if (!self) {
        fkpy_room_free(&regions);
        fkpy_room_free(&layers);
        return NULL;
    }
    desc.layer_regions = layers.data;
    desc.n_layers = (uint32_t)n_layers;
    struct fkpy_handle *h = &self_of(self)->handle;
    h->name = "agent";
    h->close = close_object;
    h->wake_fd = -1;
    Py_BEGIN_ALLOW_THREADS
    rc = flexkv_agent_create(&desc, regions.data, n, &object);
    Py_END_ALLOW_THREADS
    fkpy_room_free(&regions);
    fkpy_room_free(&layers);
    if (rc) {
        Py_DECREF(self);
        return fkpy_raise(state, rc);
    }
    fkpy_handle_open(h, object, &state->agents);
    return self;
}

static PyObject *agent_close(PyObject *self, PyObject *unused)
{
    fkpy_handle_close(&self_of(self)->handle);
    Py_RETURN_NONE;
}

static void agent_dealloc(PyObject *self)
{
    fkpy_handle_drop(&self_of(self)->handle);
    fkpy_free(self);
}

static PyObject *agent_enter(PyObject *self, PyObject *unused)
{
    Py_INCREF(self);
    return self;
}

static PyObject *agent_exit(PyObject *self, PyObject *args)
{
    return agent_close(self, NULL);
}

/* ---- calls ---- */

/* Quick: the agent's thread never holds its lock while it waits or copies. */
static PyObject *agent_state(PyObject *self, PyObject *unused)
{
    struct fkpy_call c;

    if (!fkpy_call_begin(&c, fkpy_state_of(self), &self_of(self)->handle, false))
        return NULL;
    int state = flexkv_agent_state(c.handle->object);
    fkpy_call_end(&c);
    return PyLong_FromLong(state);
}

static PyObject *agent_error(PyObject *self, void *unused)
{
    struct fkpy_call c;

    if (!fkpy_call_begin(&c, fkpy_state_of(self), &self_of(self)->handle, false))
        return NULL;
    const char *text = flexkv_agent_state(c.handle->object) < 0 ? flexkv_last_error() : "";
    fkpy_call_end(&c);
    return PyUnicode_DecodeUTF8(text, (Py_ssize_t)strlen(text), "replace");
}

static PyObject *agent_revoke(PyObject *self, PyObject *args, PyObject *kw)
{
    static char *names[] = { "ops", "timeout_ms", NULL };
    PyObject *ops_arg, *timeout_arg = NULL;
    int timeout_ms = 5000;
    struct fkpy_room ops;
    struct fkpy_call c;
    size_t n;

    if (!PyArg_ParseTupleAndKeywords(args, kw, "O|O:revoke", names, &ops_arg, &timeout_arg) ||
        !fkpy_int(timeout_arg, "timeout_ms", 0, &timeout_ms) ||
        !fkpy_u64s(ops_arg, "ops", &ops, &n))
        return NULL;
    if (!fkpy_call_begin(&c, fkpy_state_of(self), &self_of(self)->handle, true)) {
        fkpy_room_free(&ops);
        return NULL;
    }
    int rc = flexkv_agent_revoke(c.handle->object, ops.data, n, timeout_ms);
    fkpy_call_end(&c);
    fkpy_room_free(&ops);
    if (rc && rc != -ETIMEDOUT)
        return fkpy_raise(fkpy_state_of(self), rc);
    return PyBool_FromLong(rc == 0);
}

static PyObject *agent_wait_layer(PyObject *self, PyObject *args)
{
    PyObject *ops_arg;
    unsigned layer;
    unsigned long long stream;
    int timeout_ms;
    struct fkpy_room ops;
    struct fkpy_call c;
    size_t n;

    if (!PyArg_ParseTuple(args, "OIKi:wait_layer", &ops_arg, &layer, &stream, &timeout_ms) ||
        !fkpy_u64s(ops_arg, "ops", &ops, &n))
        return NULL;
    if (!fkpy_call_begin(&c, fkpy_state_of(self), &self_of(self)->handle, true)) {
        fkpy_room_free(&ops);
        return NULL;
    }
    int rc = flexkv_agent_wait_layer(c.handle->object, ops.data, n, layer, (void *)(uintptr_t)stream,
                                     timeout_ms);
    fkpy_call_end(&c);
    fkpy_room_free(&ops);
    return PyLong_FromLong(rc);
}

static PyObject *agent_wait_loaded(PyObject *self, PyObject *args)
{
    PyObject *ops_arg;
    unsigned long long stream;
    struct fkpy_room ops;
    struct fkpy_call c;
    size_t n;

    if (!PyArg_ParseTuple(args, "OK:wait_loaded", &ops_arg, &stream) || !fkpy_u64s(ops_arg, "ops", &ops, &n))
        return NULL;
    if (!fkpy_call_begin(&c, fkpy_state_of(self), &self_of(self)->handle, true)) {
        fkpy_room_free(&ops);
        return NULL;
    }
    int rc = flexkv_agent_wait_loaded(c.handle->object, ops.data, n, (void *)(uintptr_t)stream);
    fkpy_call_end(&c);
    fkpy_room_free(&ops);
    if (rc)
        return fkpy_raise(fkpy_state_of(self), rc);
    Py_RETURN_NONE;
}

static PyObject *agent_serve_layers(PyObject *self, PyObject *args)
{
    const char *address;
    struct fkpy_call c;

    if (!PyArg_ParseTuple(args, "s:serve_layers", &address) ||
        !fkpy_call_begin(&c, fkpy_state_of(self), &self_of(self)->handle, true))
        return NULL;
    int rc = flexkv_agent_serve_layers(c.handle->object, address);
    fkpy_call_end(&c);
    if (rc)
        return fkpy_raise(fkpy_state_of(self), rc);
    Py_RETURN_NONE;
}

static PyObject *agent_closed(PyObject *self, void *unused)
{
    return PyBool_FromLong(atomic_load(&self_of(self)->handle.life) != FKPY_OPEN);
}

static PyMethodDef methods[] = {
    { "state", agent_state, METH_NOARGS,
      "1: registered at a node; 0: looking for it; -errno: turned away." },
    { "revoke", FKPY_KEYWORDS(agent_revoke), "revoke(ops, timeout_ms=5000): after True these "
      "operations touch the pages no more. False: a copy did not stop in time." },
    { "wait_layer", agent_wait_layer, METH_VARARGS, "wait_layer(ops, layer, stream, timeout_ms): "
      "the CUDA stream waits for the layer's pages of these operations (get with layerwise); "
      "stream 0: the caller does. 0 or -errno." },
    { "wait_loaded", agent_wait_loaded, METH_VARARGS, "wait_loaded(ops, stream): the CUDA stream waits for "
      "the pages of these operations (get with early, reported EARLY)." },
    { "serve_layers", agent_serve_layers, METH_VARARGS, "serve_layers(address): takes an engine's "
      "eventfds, one for each layer and counter; get with counter adds 1 to each as it is loaded." },
    { "close", agent_close, METH_NOARGS, "Stops copying, leaves the node. May be repeated." },
    { "__enter__", agent_enter, METH_NOARGS, NULL },
    { "__exit__", agent_exit, METH_VARARGS, NULL },
    { 0 },
};

static PyGetSetDef properties[] = {
    { "closed", agent_closed, NULL, "whether close() was called", NULL },
    { "error", agent_error, NULL, "why the node turned it away; \"\" when it did not", NULL },
    { 0 },
};

static PyType_Slot slots[] = {
    { Py_tp_doc, "Agent(address, regions, *, space=None, instance='', worker=0, slice=0, "
      "replica=0, replicas=1, timeout_ms=0, layers=None): copies between this process's pages and a node." },
    { Py_tp_new, agent_new },
    { Py_tp_dealloc, agent_dealloc },
    { Py_tp_methods, methods },
    { Py_tp_getset, properties },
    { 0 },
};
PyType_Spec fkpy_agent_spec = {
    "flexkv.Agent", sizeof(struct agent), 0, Py_TPFLAGS_DEFAULT, slots,
};
