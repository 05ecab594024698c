/*
 * args.c - what a call was given, checked and turned into C. See flexkv_py.h.
 *
 * Lists of int and bytes have short ways of their own, because they come with every request;
 * everything else goes through the buffer or the sequence protocol. Nothing of the caller's is
 * kept: while a call runs without the GIL another thread may change a list or a buffer.
 */
#include <limits.h>
#include <string.h>

#include "flexkv_py.h"

/* ---- arguments by position and name ---- */

static bool take_keyword(const struct fkpy_signature *sig, PyObject *name, PyObject *value,
                         PyObject **out)
{
    for (Py_ssize_t i = 0; i < sig->total; i++) {
        if (PyUnicode_CompareWithASCIIString(name, sig->names[i]) != 0)
            continue;
        if (out[i]) {
            PyErr_Format(PyExc_TypeError, "%s() got multiple values for argument '%s'",
                         sig->function, sig->names[i]);
            return false;
        }
        out[i] = value;
        return true;
    }
    PyErr_Format(PyExc_TypeError, "%s() got an unexpected keyword argument '%U'", sig->function,
                 name);
    return false;
}

bool fkpy_arguments(const struct fkpy_signature *sig, PyObject *const *args, Py_ssize_t n,
                    PyObject *kwnames, PyObject *out[FKPY_MAX_ARGS])
{
    Py_ssize_t n_keywords = kwnames ? PyTuple_Size(kwnames) : 0;

    if (n > sig->total) {
        PyErr_Format(PyExc_TypeError, "%s() takes at most %zd arguments (%zd given)",
                     sig->function, sig->total, n);
        return false;
    }
    for (Py_ssize_t i = 0; i < FKPY_MAX_ARGS; i++)
        out[i] = i < n ? args[i] : NULL;
    for (Py_ssize_t i = 0; i < n_keywords; i++)
        if (!take_keyword(sig, PyTuple_GetItem(kwnames, i), args[n + i], out))
            return false;
    for (Py_ssize_t i = 0; i < sig->required; i++) {
        if (!out[i]) {
            PyErr_Format(PyExc_TypeError, "%s() is missing the argument '%s'", sig->function,
                         sig->names[i]);
            return false;
        }
    }
    return true;
}

/* ---- integers ---- */

/* Too large is a wrong value like others. */
static bool out_of_range(const char *what, const char *range)
{
    if (PyErr_Occurred() && !PyErr_ExceptionMatches(PyExc_OverflowError))
        return false;
    PyErr_Format(PyExc_ValueError, "%s must be %s", what, range);
    return false;
}

bool fkpy_u64(PyObject *o, const char *what, uint64_t *out)
{
    PyObject *number = o ? PyNumber_Index(o) : NULL;

    if (!o)
        return true;
    if (!number)
        return false;
    *out = PyLong_AsUnsignedLongLong(number);
    Py_DECREF(number);
    return !PyErr_Occurred() || out_of_range(what, "0 to 2^64 - 1");
}

bool fkpy_u32(PyObject *o, const char *what, uint32_t *out)
{
    if (!o)
        return true;
    long long value = PyLong_AsLongLong(o);
    if (value < 0 || value > UINT32_MAX)
        return out_of_range(what, "0 to 2^32 - 1");
    *out = (uint32_t)value;
    return true;
}

bool fkpy_int(PyObject *o, const char *what, int min, int *out)
{
    if (!o)
        return true;
    long long value = PyLong_AsLongLong(o);
    if ((value == -1 && PyErr_Occurred()) || value < min || value > INT_MAX)
        return out_of_range(what, min < 0 ? "-1 to 2^31 - 1" : min ? "1 to 2^31 - 1"
                                                                   : "0 to 2^31 - 1");
    *out = (int)value;
    return true;
}

/* ---- room ---- */

bool fkpy_room_take(struct fkpy_room *room, size_t bytes)
{
    room->data = bytes <= sizeof(room->small) ? room->small : PyMem_Malloc(bytes);
    if (!room->data)
        PyErr_NoMemory();
    return room->data != NULL;
}

void fkpy_room_free(struct fkpy_room *room)
{
    if (room->data != room->small)
        PyMem_Free(room->data);
    room->data = NULL;
}

/* ---- lists and buffers of integers ---- */

static bool bad_item(const char *what, Py_ssize_t i)
{
    if (PyErr_Occurred() && !PyErr_ExceptionMatches(PyExc_OverflowError))
        return false;
    PyErr_Format(PyExc_ValueError, "%s[%zd] must be 0 to 2^32 - 1", what, i);
    return false;
}

static bool list_to_u32s(PyObject *list, const char *what, struct fkpy_room *room, size_t *n)
{
    Py_ssize_t count = PyList_Size(list);

    if (!fkpy_room_take(room, (size_t)count * sizeof(uint32_t)))
        return false;
    uint32_t *to = room->data;
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *item = PyList_GetItem(list, i);
        if (!item)
            return false;
        Py_INCREF(item);            /* its __index__ may take it out of the list */
        long long value = PyLong_AsLongLong(item);
        Py_DECREF(item);
        if (value < 0 || value > UINT32_MAX)
            return bad_item(what, i);
        to[i] = (uint32_t)value;
    }
    *n = (size_t)count;
    return true;
}

static bool tell_bad_item(const Py_buffer *view, const char *what)
{
    const char *from = view->buf;

    for (Py_ssize_t i = 0; i < view->len / view->itemsize; i++) {
        int64_t value;
        int32_t narrow;
        if (view->itemsize == 8) {
            memcpy(&value, from + i * 8, sizeof(value));
        } else {
            memcpy(&narrow, from + i * 4, sizeof(narrow));
            value = narrow;
        }
        if (value < 0 || value > UINT32_MAX)
            return bad_item(what, i);
    }
    PyErr_Format(PyExc_ValueError, "%s changed while they were read", what);
    return false;
}

/* The last letter of a format of the buffer protocol, if it is of the machine's byte order. */
static char format_letter(const Py_buffer *view)
{
    const char *format = view->format ? view->format : "B";

    if (*format == '@' || *format == '=' || *format == '<')     /* x86, arm: little-endian */
        format++;
    return format[0] && !format[1] ? *format : 0;
}

static bool copy_u32s(const Py_buffer *view, bool is_signed, uint32_t *to)
{
    size_t n = (size_t)(view->len / view->itemsize);
    const char *from = view->buf;
    uint64_t bad = 0, value;

    if (view->itemsize == 4) {
        memcpy(to, from, n * sizeof(*to));
        for (size_t i = 0; is_signed && i < n; i++)
            bad |= to[i] >> 31;
        return !bad;
    }
    for (size_t i = 0; i < n; i++) {
        memcpy(&value, from + i * sizeof(value), sizeof(value));
        bad |= value >> 32;
        to[i] = (uint32_t)value;
    }
    return !bad;
}

static bool view_to_u32s(const Py_buffer *view, const char *what, struct fkpy_room *room, size_t *n)
{
    char letter = format_letter(view);

    if (!letter || !strchr("iIlLqQnN", letter) || view->ndim != 1 ||
        (view->itemsize != 4 && view->itemsize != 8)) {
        PyErr_Format(PyExc_TypeError, "%s: expected a list of int or a one-dimensional buffer of "
                     "4- or 8-byte integers, not format '%s' in %d dimensions", what,
                     view->format ? view->format : "B", view->ndim);
        return false;
    }
    *n = (size_t)(view->len / view->itemsize);
    if (!fkpy_room_take(room, *n * sizeof(uint32_t)))
        return false;
    return copy_u32s(view, strchr("ilqn", letter) != NULL, room->data) || tell_bad_item(view, what);
}

static bool buffer_to_u32s(PyObject *o, const char *what, struct fkpy_room *room, size_t *n)
{
    Py_buffer view;

    if (PyObject_GetBuffer(o, &view, PyBUF_FORMAT | PyBUF_C_CONTIGUOUS) != 0)
        return false;
    bool ok = view_to_u32s(&view, what, room, n);
    PyBuffer_Release(&view);
    return ok;
}

/* Any other sequence, as a list of our own. */
static PyObject *as_list(PyObject *o, const char *what)
{
    if (PySequence_Check(o) && !PyUnicode_Check(o))
        return PySequence_List(o);
    PyErr_Format(PyExc_TypeError, "%s: expected a sequence, not %R", what, Py_TYPE(o));
    return NULL;
}

bool fkpy_u32s(PyObject *o, const char *what, struct fkpy_room *room, size_t *n)
{
    room->data = NULL;
    bool ok;

    if (PyList_Check(o)) {
        ok = list_to_u32s(o, what, room, n);
    } else if (PyObject_CheckBuffer(o)) {
        ok = buffer_to_u32s(o, what, room, n);
    } else {
        PyObject *list = as_list(o, what);
        ok = list && list_to_u32s(list, what, room, n);
        Py_XDECREF(list);
    }
    if (!ok)
        fkpy_room_free(room);
    return ok;
}

bool fkpy_u64s(PyObject *o, const char *what, struct fkpy_room *room, size_t *n)
{
    PyObject *list = as_list(o, what);
    bool ok = list != NULL;

    room->data = NULL;
    *n = list ? (size_t)PyList_Size(list) : 0;
    ok = ok && fkpy_room_take(room, *n * sizeof(uint64_t));
    for (size_t i = 0; ok && i < *n; i++)
        ok = fkpy_u64(PyList_GetItem(list, (Py_ssize_t)i), what, (uint64_t *)room->data + i);
    Py_XDECREF(list);
    if (!ok)
        fkpy_room_free(room);
    return ok;
}

/* ---- hashes and keys ---- */

bool fkpy_event_hash(PyObject *o, const char *what, uint64_t *out)
{
    if (PyBytes_Check(o)) {
        Py_ssize_t length = PyBytes_Size(o);
        if (length < 8) {
            PyErr_Format(PyExc_ValueError, "%s: a hash of %zd bytes; 8 are the least", what, length);
            return false;
        }
        uint64_t tail;
        memcpy(&tail, PyBytes_AsString(o) + length - 8, sizeof(tail));
        *out = __builtin_bswap64(tail);
        return true;
    }
    *out = PyLong_AsUnsignedLongLongMask(o);
    if (!PyErr_Occurred())
        return true;
    if (PyErr_ExceptionMatches(PyExc_TypeError))
        PyErr_Format(PyExc_TypeError, "%s: a hash is an int or bytes, not %R", what, Py_TYPE(o));
    return false;
}

static bool list_to_event_hashes(PyObject *list, struct fkpy_room *room, size_t *n)
{
    Py_ssize_t count = PyList_Size(list);

    if (!fkpy_room_take(room, (size_t)count * sizeof(uint64_t)))
        return false;
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *item = PyList_GetItem(list, i);
        if (!item)
            return false;
        Py_INCREF(item);            /* its __index__ may take it out of the list */
        bool ok = fkpy_event_hash(item, "event_hashes", (uint64_t *)room->data + i);
        Py_DECREF(item);
        if (!ok)
            return false;
    }
    *n = (size_t)count;
    return true;
}

static bool view_to_event_hashes(const Py_buffer *view, struct fkpy_room *room, size_t *n)
{
    char letter = format_letter(view);
    bool bytes = letter == 'B' && view->len % 8 == 0;       /* 8-byte integers as they lie */

    if (!bytes && (!letter || !strchr("lLqQnN", letter) || view->itemsize != 8)) {
        PyErr_SetString(PyExc_TypeError, "event_hashes: expected a list of int or bytes, or a buffer "
                        "of 8-byte integers");
        return false;
    }
    *n = (size_t)view->len / 8;
    if (!fkpy_room_take(room, (size_t)view->len))
        return false;
    memcpy(room->data, view->buf, (size_t)view->len);
    return true;
}

bool fkpy_event_hashes(PyObject *o, struct fkpy_room *room, size_t *n)
{
    Py_buffer view;
    bool ok;

    room->data = NULL;
    if (PyList_Check(o)) {
        ok = list_to_event_hashes(o, room, n);
    } else if (PyObject_CheckBuffer(o)) {
        ok = PyObject_GetBuffer(o, &view, PyBUF_FORMAT | PyBUF_C_CONTIGUOUS) == 0;
        if (ok) {
            ok = view_to_event_hashes(&view, room, n);
            PyBuffer_Release(&view);
        }
    } else {
        PyObject *list = as_list(o, "event_hashes");
        ok = list && list_to_event_hashes(list, room, n);
        Py_XDECREF(list);
    }
    if (!ok)
        fkpy_room_free(room);
    return ok;
}

static bool copy_hash(PyObject *list, Py_ssize_t i, char *to, Py_ssize_t expected)
{
    PyObject *item = PyList_GetItem(list, i);
    Py_ssize_t length;
    char *bytes;

    if (!item || PyBytes_AsStringAndSize(item, &bytes, &length) != 0)
        return false;
    if (length != expected) {
        PyErr_Format(PyExc_ValueError, "hash %zd has %zd bytes, the first one has %zd", i, length,
                     expected);
        return false;
    }
    memcpy(to, bytes, (size_t)length);
    return true;
}

static bool copy_hashes(PyObject *list, struct fkpy_room *room, size_t *hash_bytes, size_t *n)
{
    Py_ssize_t count = PyList_Size(list);
    PyObject *first = count ? PyList_GetItem(list, 0) : NULL;
    Py_ssize_t length = first && PyBytes_Check(first) ? PyBytes_Size(first) : 8;

    if (length < 8) {
        PyErr_Format(PyExc_ValueError, "hashes of %zd bytes: 8 are the least, or blocks are "
                     "mistaken for each other", length);
        return false;
    }
    *n = (size_t)count;
    *hash_bytes = (size_t)length;
    if (!fkpy_room_take(room, (size_t)count * (size_t)length))
        return false;
    char *to = room->data;
    for (Py_ssize_t i = 0; i < count; i++, to += length)
        if (!copy_hash(list, i, to, length))
            return false;
    return true;
}

bool fkpy_hashes(PyObject *o, struct fkpy_room *room, size_t *hash_bytes, size_t *n)
{
    PyObject *list;

    room->data = NULL;
    if (PyList_Check(o)) {
        list = o;
        Py_INCREF(list);
    } else {
        list = as_list(o, "hashes");
    }
    bool ok = list && copy_hashes(list, room, hash_bytes, n);
    Py_XDECREF(list);
    if (!ok)
        fkpy_room_free(room);
    return ok;
}

static bool copy_keys(PyObject *o, struct fkpy_room *room, Py_ssize_t *bytes)
{
    Py_buffer view;

    if (PyObject_GetBuffer(o, &view, PyBUF_SIMPLE) != 0)
        return false;
    *bytes = view.len;
    bool ok = fkpy_room_take(room, (size_t)view.len);
    if (ok)
        memcpy(room->data, view.buf, (size_t)view.len);
    PyBuffer_Release(&view);
    return ok;
}

bool fkpy_keys(PyObject *o, struct fkpy_room *room, const flexkv_key **keys, uint32_t *n)
{
    Py_ssize_t bytes;

    room->data = NULL;
    if (PyBytes_Check(o)) {
        /* The data of a bytes object follow its header, which is words: they are aligned. */
        *keys = (const flexkv_key *)(const void *)PyBytes_AsString(o);
        bytes = PyBytes_Size(o);
    } else {
        if (!copy_keys(o, room, &bytes))
            return false;
        *keys = room->data;
    }
    if (bytes % KEY_BYTES || bytes / KEY_BYTES > UINT32_MAX) {
        PyErr_Format(PyExc_ValueError, "keys are 16 bytes each; %zd bytes are no whole number of "
                     "them", bytes);
        fkpy_room_free(room);
        return false;
    }
    *n = (uint32_t)(bytes / KEY_BYTES);
    return true;
}

/* ---- regions ---- */

static bool to_region(PyObject *tuple, flexkv_region *region)
{
    uint64_t base = 0;

    if (!PyTuple_Check(tuple) || PyTuple_Size(tuple) != 4) {
        PyErr_SetString(PyExc_TypeError,
                        "a region is a tuple (base address, stride, page bytes, pages)");
        return false;
    }
    bool ok = fkpy_u64(PyTuple_GetItem(tuple, 0), "base address", &base) &&
              fkpy_u64(PyTuple_GetItem(tuple, 1), "stride", &region->stride) &&
              fkpy_u64(PyTuple_GetItem(tuple, 2), "page bytes", &region->page_bytes) &&
              fkpy_u64(PyTuple_GetItem(tuple, 3), "pages", &region->pages);
    region->base = (void *)(uintptr_t)base;
    return ok;
}

bool fkpy_regions(PyObject *o, struct fkpy_room *room, size_t *n)
{
    PyObject *list = as_list(o, "regions");
    bool ok = list != NULL;

    room->data = NULL;
    *n = list ? (size_t)PyList_Size(list) : 0;
    ok = ok && fkpy_room_take(room, *n * sizeof(flexkv_region));
    for (size_t i = 0; ok && i < *n; i++)
        ok = to_region(PyList_GetItem(list, (Py_ssize_t)i), (flexkv_region *)room->data + i);
    Py_XDECREF(list);
    if (!ok)
        fkpy_room_free(room);
    return ok;
}
