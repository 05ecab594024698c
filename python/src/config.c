/*
 * config.c - flexkv.Config: options of a node. The library's config is for one thread at a time,
 * which the GIL sees to, except while a node is being opened with it: `busy` then.
 */
#include "flexkv_py.h"

static struct fkpy_config *self_of(PyObject *self)
{
    return (struct fkpy_config *)(void *)self;
}

static PyObject *config_new(PyTypeObject *type, PyObject *args, PyObject *kw)
{
    static char *names[] = { NULL };

    if (!PyArg_ParseTupleAndKeywords(args, kw, ":Config", names))
        return NULL;
    PyObject *self = PyType_GenericAlloc(type, 0);
    if (!self)
        return NULL;
    int rc = flexkv_config_create(&self_of(self)->config);
    if (rc) {
        fkpy_raise(fkpy_state_of(self), rc);
        Py_DECREF(self);
        return NULL;
    }
    return self;
}

static void config_dealloc(PyObject *self)
{
    flexkv_config_destroy(self_of(self)->config);
    fkpy_free(self);
}

/* NULL, with an exception, while another thread opens a node with it. */
static flexkv_config *idle_config(PyObject *self)
{
    if (!self_of(self)->busy)
        return self_of(self)->config;
    fkpy_raise_text(fkpy_state_of(self), EBUSY, "a node is being opened with this config");
    return NULL;
}

static PyObject *none_or_error(PyObject *self, int rc)
{
    if (rc)
        return fkpy_raise(fkpy_state_of(self), rc);
    Py_RETURN_NONE;
}

static PyObject *load_default(PyObject *self, PyObject *unused)
{
    flexkv_config *config = idle_config(self);

    return config ? none_or_error(self, flexkv_config_load_default(config)) : NULL;
}

static PyObject *load_env(PyObject *self, PyObject *unused)
{
    flexkv_config *config = idle_config(self);

    return config ? none_or_error(self, flexkv_config_load_env(config)) : NULL;
}

static PyObject *load_file(PyObject *self, PyObject *args, PyObject *kw)
{
    static char *names[] = { "path", NULL };
    flexkv_config *config = idle_config(self);
    PyObject *path;                 /* bytes */

    if (!config || !PyArg_ParseTupleAndKeywords(args, kw, "O&:load_file", names,
                                                PyUnicode_FSConverter, &path))
        return NULL;
    PyObject *result = none_or_error(self, flexkv_config_load_file(config, PyBytes_AsString(path)));
    Py_DECREF(path);
    return result;
}

static PyObject *set(PyObject *self, PyObject *args, PyObject *kw)
{
    static char *names[] = { "key", "value", NULL };
    flexkv_config *config = idle_config(self);
    const char *key, *value;

    if (!config || !PyArg_ParseTupleAndKeywords(args, kw, "ss:set", names, &key, &value))
        return NULL;
    return none_or_error(self, flexkv_config_set(config, key, value));
}

static PyObject *get(PyObject *self, PyObject *args, PyObject *kw)
{
    static char *names[] = { "key", NULL };
    flexkv_config *config = idle_config(self);
    struct fkpy_room room = { 0 };
    const char *key;

    if (!config || !PyArg_ParseTupleAndKeywords(args, kw, "s:get", names, &key))
        return NULL;
    int length = flexkv_config_get(config, key, room.small, sizeof(room.small));
    if (length < 0)
        return fkpy_raise(fkpy_state_of(self), length);
    if (!fkpy_room_take(&room, (size_t)length + 1))
        return NULL;
    if (room.data != room.small)
        flexkv_config_get(config, key, room.data, (size_t)length + 1);
    PyObject *text = PyUnicode_DecodeUTF8(room.data, length, "replace");
    fkpy_room_free(&room);
    return text;
}

static PyMethodDef methods[] = {
    { "load_default", load_default, METH_NOARGS,
      "What a node does by itself: the environment, and the file FLEXKV_CONFIG_PATH names." },
    { "load_file", FKPY_KEYWORDS(load_file), "load_file(path)" },
    { "load_env", load_env, METH_NOARGS, "load_env()" },
    { "set", FKPY_KEYWORDS(set), "set(key, value): one option; wins over file and environment." },
    { "get", FKPY_KEYWORDS(get),
      "get(key): the effective value as text; nothing can be set after." },
    { 0 },
};

static PyType_Slot slots[] = {
    { Py_tp_doc, "Options of a node: flexkv.conf(5)." },
    { Py_tp_new, config_new },
    { Py_tp_dealloc, config_dealloc },
    { Py_tp_methods, methods },
    { 0 },
};
PyType_Spec fkpy_config_spec = {
    "flexkv.Config", sizeof(struct fkpy_config), 0, Py_TPFLAGS_DEFAULT, slots,
};
