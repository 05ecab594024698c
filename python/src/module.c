/*
 * module.c - the module flexkv._flexkv itself: its types, its exception, its constants, and what
 * happens when the interpreter ends.
 */
#include <string.h>

#include "flexkv_py.h"

struct fkpy_state *fkpy_state_of(PyObject *self)
{
    return PyType_GetModuleState(Py_TYPE(self));
}

PyObject *fkpy_raise_text(struct fkpy_state *state, int error, const char *text)
{
    PyObject *message = PyUnicode_DecodeUTF8(text, (Py_ssize_t)strlen(text), "replace");
    PyObject *args = message ? Py_BuildValue("(iN)", error, message) : NULL;

    if (args)
        PyErr_SetObject(state->error, args);
    Py_XDECREF(args);
    return NULL;
}

PyObject *fkpy_raise(struct fkpy_state *state, int rc)
{
    const char *text = flexkv_last_error();

    return fkpy_raise_text(state, -rc, *text ? text : strerror(-rc));
}

void fkpy_free(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);

    release(self);
    Py_DECREF(type);
}

PyObject *fkpy_record(PyTypeObject *type, PyObject **fields, Py_ssize_t n)
{
    PyObject *record = PyErr_Occurred() ? NULL : PyStructSequence_New(type);

    for (Py_ssize_t i = 0; i < n; i++) {
        if (record)
            PyStructSequence_SetItem(record, i, fields[i]);
        else
            Py_XDECREF(fields[i]);
    }
    return record;
}

/* ---- functions ---- */

static PyObject *version(PyObject *module, PyObject *unused)
{
    return PyUnicode_FromString(flexkv_version());
}

static PyObject *close_all(PyObject *module, PyObject *unused)
{
    fkpy_handles_close_all(PyModule_GetState(module));
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    { "version", version, METH_NOARGS, "The library's version." },
    { "_close_all", close_all, METH_NOARGS, "Closes all agents and nodes; runs at exit." },
    { 0 },
};

/* ---- contents ---- */

static PyStructSequence_Field completion_fields[] = {
    { "op", "number of the operation" },
    { "kind", "OP_GET, OP_PUT or OP_PREFETCH" },
    { "status", "0, or -errno of the first block that failed" },
    { "blocks", "asked for" },
    { "blocks_ok", "leading blocks that were got, are stored, or are in the cpu tier" },
    { "flags", "PAGES_BUSY: pages may still be read or written until Agent.revoke; EARLY: until Agent.wait_loaded" },
    { 0 },
};
static PyStructSequence_Desc completion_desc = {
    "flexkv.Completion", "The outcome of an operation.", completion_fields, 6,
};

static PyStructSequence_Field match_fields[] = {
    { "lease", "for Node.get; 0 when blocks is 0" },
    { "blocks", "leading blocks that are known" },
    { "cpu_blocks", "of these, in the cpu tier" },
    { "ssd_blocks", "of these, on SSD only" },
    { "peer_blocks", "of these, on other nodes or in a shared store only" },
    { 0 },
};
static PyStructSequence_Desc match_desc = {
    "flexkv.Match", "What is known of a prompt.", match_fields, 5,
};

static bool add_type(PyObject *module, PyTypeObject *type)
{
    return type && PyModule_AddType(module, type) == 0;
}

static bool add_class(PyObject *module, PyType_Spec *spec, PyTypeObject **out)
{
    *out = (PyTypeObject *)PyType_FromModuleAndSpec(module, spec, NULL);
    return add_type(module, *out);
}

static bool add_record(PyObject *module, PyStructSequence_Desc *desc, PyTypeObject **out)
{
    *out = PyStructSequence_NewType(desc);
    return add_type(module, *out);
}

static bool add_error(PyObject *module, struct fkpy_state *state)
{
    state->error = PyErr_NewExceptionWithDoc(
        "flexkv.Error", "A call failed: errno, and a message that names the cause.",
        PyExc_OSError, NULL);
    return state->error && PyModule_AddObjectRef(module, "Error", state->error) == 0;
}

static bool add_constants(PyObject *module)
{
    return PyModule_AddIntConstant(module, "OP_GET", FLEXKV_OP_GET) == 0 &&
           PyModule_AddIntConstant(module, "OP_PUT", FLEXKV_OP_PUT) == 0 &&
           PyModule_AddIntConstant(module, "OP_PREFETCH", FLEXKV_OP_PREFETCH) == 0 &&
           PyModule_AddIntConstant(module, "PAGES_BUSY", FLEXKV_COMPLETION_PAGES_BUSY) == 0 &&
           PyModule_AddIntConstant(module, "EARLY", FLEXKV_COMPLETION_EARLY) == 0;
}

/* Agents and nodes that are left open go before the memory they copy to and from, which the
 * interpreter frees in any order. */
static bool close_at_exit(PyObject *module)
{
    PyObject *callback = PyObject_GetAttrString(module, "_close_all");
    PyObject *atexit = PyImport_ImportModule("atexit");
    PyObject *done = callback && atexit
                   ? PyObject_CallMethod(atexit, "register", "O", callback) : NULL;
    bool ok = done != NULL;

    Py_XDECREF(done);
    Py_XDECREF(atexit);
    Py_XDECREF(callback);
    return ok;
}

static int fill_module(PyObject *module)
{
    struct fkpy_state *state = PyModule_GetState(module);

    if (fkpy_handles_init()) {
        PyErr_NoMemory();
        return -1;
    }
    bool ok = add_error(module, state) && add_constants(module) &&
              add_record(module, &completion_desc, &state->completion) &&
              add_record(module, &match_desc, &state->match) &&
              add_class(module, &fkpy_config_spec, &state->config) &&
              add_class(module, &fkpy_node_spec, &state->node) &&
              add_class(module, &fkpy_space_spec, &state->space) &&
              add_class(module, &fkpy_namespace_spec, &state->ns) &&
              add_class(module, &fkpy_agent_spec, &state->agent) &&
              add_class(module, &fkpy_events_spec, &state->events) && close_at_exit(module);
    return ok ? 0 : -1;
}

static PyModuleDef_Slot slots[] = {
    { Py_mod_exec, fill_module },
    { 0 },
};

/* The types refer to the module and the module to the types: they live until the process ends. */
static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "flexkv._flexkv",
    .m_doc = "libflexkv's C API as Python objects; use it through the package flexkv.",
    .m_size = sizeof(struct fkpy_state),
    .m_methods = functions,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__flexkv(void);
PyMODINIT_FUNC PyInit__flexkv(void)
{
    return PyModuleDef_Init(&definition);
}
