/* namespace.c - flexkv.Namespace: keys, match, put, prefetch. These come with every request. */
#include <string.h>

#include "flexkv_py.h"

struct namespace {
    PyObject_HEAD
    struct fkpy_space *space;       /* a reference */
    flexkv_namespace *ns;
};

static struct namespace *self_of(PyObject *self)
{
    return (struct namespace *)(void *)self;
}

static bool begin(struct fkpy_call *c, PyObject *self, bool release_gil)
{
    return fkpy_node_begin(c, fkpy_state_of(self), self_of(self)->space->node, release_gil);
}

/* ---- opening ---- */

static PyObject *new_namespace(struct fkpy_state *state, PyObject *space, flexkv_namespace *ns)
{
    PyObject *self = PyType_GenericAlloc(state->ns, 0);

    if (!self)
        return NULL;
    Py_INCREF(space);
    self_of(self)->space = (struct fkpy_space *)(void *)space;
    self_of(self)->ns = ns;
    return self;
}

/* The strings belong to the tuple. */
static bool part_strings(PyObject *parts, struct fkpy_room *room)
{
    Py_ssize_t n = PyTuple_Size(parts), length;

    if (!fkpy_room_take(room, (size_t)n * sizeof(char *)))
        return false;
    const char **text = room->data;
    for (Py_ssize_t i = 0; i < n; i++) {
        text[i] = PyUnicode_AsUTF8AndSize(PyTuple_GetItem(parts, i), &length);
        if (text[i] && strlen(text[i]) != (size_t)length)
            PyErr_Format(PyExc_ValueError, "part %zd of a namespace has a null character", i);
        if (PyErr_Occurred()) {
            fkpy_room_free(room);
            return false;
        }
    }
    return true;
}

PyObject *fkpy_space_namespace(PyObject *self, PyObject *parts)
{
    struct fkpy_space *space = (struct fkpy_space *)(void *)self;
    struct fkpy_state *state = fkpy_state_of(self);
    struct fkpy_room text;
    flexkv_namespace *ns;
    struct fkpy_call c;

    if (!part_strings(parts, &text))
        return NULL;
    if (!fkpy_node_begin(&c, state, space->node, false)) {
        fkpy_room_free(&text);
        return NULL;
    }
    int rc = flexkv_namespace_open(space->space, text.data, (size_t)PyTuple_Size(parts), &ns);
    fkpy_call_end(&c);
    fkpy_room_free(&text);
    return rc ? fkpy_raise(state, rc) : new_namespace(state, self, ns);
}

static void namespace_dealloc(PyObject *self)
{
    Py_XDECREF((PyObject *)self_of(self)->space);
    fkpy_free(self);
}

/* ---- keys ---- */

static flexkv_key *bytes_as_keys(PyObject *bytes)
{
    return (flexkv_key *)(void *)PyBytes_AsString(bytes);
}

static PyObject *token_keys(PyObject *self, const flexkv_key *prev, const uint32_t *tokens,
                            size_t n)
{
    enum { LONG_PROMPT = 16384 };   /* from here on hashing takes longer than a thread switch */
    uint32_t per_block = self_of(self)->space->tokens_per_block;
    PyObject *keys = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(n / per_block) * KEY_BYTES);
    struct fkpy_call c;

    if (!keys || !begin(&c, self, n >= LONG_PROMPT)) {
        Py_XDECREF(keys);
        return NULL;
    }
    flexkv_keys_from_tokens(self_of(self)->ns, prev, tokens, n, bytes_as_keys(keys));
    fkpy_call_end(&c);
    return keys;
}

static bool previous_key(PyObject *o, flexkv_key *key)
{
    if (!PyBytes_Check(o) || PyBytes_Size(o) != KEY_BYTES) {
        PyErr_SetString(PyExc_ValueError, "prev must be the 16 bytes of one key, or None");
        return false;
    }
    memcpy(key, PyBytes_AsString(o), sizeof(*key));
    return true;
}

static PyObject *keys_from_tokens(PyObject *self, PyObject *const *args, Py_ssize_t n_args,
                                  PyObject *kwnames)
{
    static const char *const names[] = { "tokens", "prev" };
    static const struct fkpy_signature sig = { "keys_from_tokens", names, 1, 2 };
    PyObject *arg[FKPY_MAX_ARGS];
    struct fkpy_room tokens;
    flexkv_key prev;
    size_t n;

    if (!fkpy_arguments(&sig, args, n_args, kwnames, arg))
        return NULL;
    bool has_prev = arg[1] && arg[1] != Py_None;
    if ((has_prev && !previous_key(arg[1], &prev)) || !fkpy_u32s(arg[0], "tokens", &tokens, &n))
        return NULL;
    PyObject *keys = token_keys(self, has_prev ? &prev : NULL, tokens.data, n);
    fkpy_room_free(&tokens);
    return keys;
}

static PyObject *hash_keys(PyObject *self, const void *hashes, size_t hash_bytes, size_t n)
{
    PyObject *keys = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)n * KEY_BYTES);
    struct fkpy_call c;

    if (!keys || !begin(&c, self, false)) {
        Py_XDECREF(keys);
        return NULL;
    }
    flexkv_keys_from_hashes(self_of(self)->ns, hashes, hash_bytes, hash_bytes, n,
                            bytes_as_keys(keys));
    fkpy_call_end(&c);
    return keys;
}

static PyObject *keys_from_hashes(PyObject *self, PyObject *const *args, Py_ssize_t n_args,
                                  PyObject *kwnames)
{
    static const char *const names[] = { "hashes" };
    static const struct fkpy_signature sig = { "keys_from_hashes", names, 1, 1 };
    PyObject *arg[FKPY_MAX_ARGS];
    struct fkpy_room hashes;
    size_t hash_bytes, n;

    if (!fkpy_arguments(&sig, args, n_args, kwnames, arg) ||
        !fkpy_hashes(arg[0], &hashes, &hash_bytes, &n))
        return NULL;
    PyObject *keys = hash_keys(self, hashes.data, hash_bytes, n);
    fkpy_room_free(&hashes);
    return keys;
}

/* ---- match ---- */

static PyObject *match_record(struct fkpy_state *state, const flexkv_match_result *m)
{
    PyObject *fields[] = {
        PyLong_FromUnsignedLongLong(m->lease), PyLong_FromUnsignedLong(m->blocks),
        PyLong_FromUnsignedLong(m->cpu_blocks), PyLong_FromUnsignedLong(m->ssd_blocks),
        PyLong_FromUnsignedLong(m->peer_blocks),
    };

    return fkpy_record(state->match, fields, 5);
}

static PyObject *match(PyObject *self, PyObject *const *args, Py_ssize_t n_args, PyObject *kwnames)
{
    static const char *const names[] = { "keys" };
    static const struct fkpy_signature sig = { "match", names, 1, 1 };
    flexkv_match_result result = { 0 };
    PyObject *arg[FKPY_MAX_ARGS];
    const flexkv_key *keys;
    struct fkpy_room room;
    struct fkpy_call c;
    uint32_t n;

    if (!fkpy_arguments(&sig, args, n_args, kwnames, arg) || !fkpy_keys(arg[0], &room, &keys, &n))
        return NULL;
    if (!begin(&c, self, false)) {
        fkpy_room_free(&room);
        return NULL;
    }
    int rc = flexkv_match(self_of(self)->ns, keys, n, &result);
    fkpy_call_end(&c);
    fkpy_room_free(&room);
    return rc ? fkpy_raise(fkpy_state_of(self), rc) : match_record(fkpy_state_of(self), &result);
}

/* ---- put and prefetch ---- */

static PyObject *start_put(PyObject *self, const flexkv_key *keys, uint32_t n, uint32_t first,
                           const flexkv_op_args *args)
{
    struct fkpy_call c;
    uint64_t op;

    if (!begin(&c, self, false))
        return NULL;
    int rc = flexkv_put(self_of(self)->ns, keys, n, first, args, &op);
    fkpy_call_end(&c);
    return rc ? fkpy_raise(fkpy_state_of(self), rc) : PyLong_FromUnsignedLongLong(op);
}

/* The library reads a page for each block: there must be as many. */
static bool check_put(uint32_t n, uint32_t first, size_t pages)
{
    if (first <= n && pages == n - first)
        return true;
    PyErr_Format(PyExc_ValueError, "put of blocks %u to %u needs as many pages, not %zu", first, n,
                 pages);
    return false;
}

struct names {                      /* what the engine calls the blocks of a put */
    struct fkpy_room hashes, tokens;
};

static bool check_names(uint32_t blocks, size_t hashes, size_t tokens, uint32_t per_block)
{
    if (hashes == blocks && tokens >= (size_t)blocks * per_block)
        return true;
    PyErr_Format(PyExc_ValueError, "put of %u blocks needs as many event_hashes, not %zu, and %zu "
                 "event_tokens, not %zu", blocks, hashes, (size_t)blocks * per_block, tokens);
    return false;
}

static void free_names(struct names *names)
{
    fkpy_room_free(&names->hashes);
    fkpy_room_free(&names->tokens);
}

static bool take_names(PyObject *self, PyObject *const arg[3], uint32_t blocks, struct names *names,
                       flexkv_op_args *to)
{
    size_t n_hashes, n_tokens;

    names->hashes.data = names->tokens.data = NULL;
    if (!arg[0] || arg[0] == Py_None)
        return true;
    if (!arg[1] || arg[1] == Py_None) {
        PyErr_SetString(PyExc_ValueError, "event_hashes without event_tokens");
        return false;
    }
    bool ok = (!arg[2] || arg[2] == Py_None ||
               fkpy_event_hash(arg[2], "event_parent", &to->event_parent)) &&
              fkpy_event_hashes(arg[0], &names->hashes, &n_hashes) &&
              fkpy_u32s(arg[1], "event_tokens", &names->tokens, &n_tokens) &&
              check_names(blocks, n_hashes, n_tokens, self_of(self)->space->tokens_per_block);
    to->event_hashes = names->hashes.data;
    to->event_tokens = names->tokens.data;
    if (!ok)
        free_names(names);
    return ok;
}

static PyObject *put(PyObject *self, PyObject *const *args, Py_ssize_t n_args, PyObject *kwnames)
{
    static const char *const names[] = { "keys", "first", "pages", "timeout_ms", "event_hashes",
                                         "event_tokens", "event_parent" };
    static const struct fkpy_signature sig = { "put", names, 3, 7 };
    flexkv_op_args op_args = { .struct_bytes = sizeof(op_args) };
    PyObject *arg[FKPY_MAX_ARGS], *op = NULL;
    struct fkpy_room room, pages;
    struct names called;
    const flexkv_key *keys;
    uint32_t n, first;
    size_t n_pages;

    if (!fkpy_arguments(&sig, args, n_args, kwnames, arg) || !fkpy_u32(arg[1], "first", &first) ||
        !fkpy_u32(arg[3], "timeout_ms", &op_args.timeout_ms) ||
        !fkpy_keys(arg[0], &room, &keys, &n))
        return NULL;
    if (fkpy_u32s(arg[2], "pages", &pages, &n_pages)) {
        op_args.pages = pages.data;
        if (check_put(n, first, n_pages) && take_names(self, &arg[4], n - first, &called, &op_args)) {
            op = start_put(self, keys, n, first, &op_args);
            free_names(&called);
        }
        fkpy_room_free(&pages);
    }
    fkpy_room_free(&room);
    return op;
}

/* ---- label ---- */

static bool label_text(PyObject *o, const char *what, const char **out)
{
    Py_ssize_t length;

    *out = NULL;
    if (!o || o == Py_None)
        return true;
    *out = PyUnicode_AsUTF8AndSize(o, &length);
    if (*out && strlen(*out) == (size_t)length)
        return true;
    if (*out)
        PyErr_Format(PyExc_ValueError, "%s has a null character", what);
    return false;
}

static PyObject *label(PyObject *self, PyObject *const *args, Py_ssize_t n_args, PyObject *kwnames)
{
    static const char *const names[] = { "lora_name", "cache_salt" };
    static const struct fkpy_signature sig = { "label", names, 0, 2 };
    PyObject *arg[FKPY_MAX_ARGS];
    const char *lora, *salt;
    struct fkpy_call c;

    if (!fkpy_arguments(&sig, args, n_args, kwnames, arg) ||
        !label_text(arg[0], "lora_name", &lora) || !label_text(arg[1], "cache_salt", &salt) ||
        !begin(&c, self, false))
        return NULL;
    int rc = flexkv_namespace_label(self_of(self)->ns, lora, salt);
    fkpy_call_end(&c);
    if (rc)
        return fkpy_raise(fkpy_state_of(self), rc);
    Py_RETURN_NONE;
}

static PyObject *prefetch(PyObject *self, PyObject *const *args, Py_ssize_t n_args,
                          PyObject *kwnames)
{
    static const char *const names[] = { "keys", "timeout_ms" };
    static const struct fkpy_signature sig = { "prefetch", names, 1, 2 };
    flexkv_op_args op_args = { .struct_bytes = sizeof(op_args) };
    PyObject *arg[FKPY_MAX_ARGS];
    const flexkv_key *keys;
    struct fkpy_room room;
    struct fkpy_call c;
    uint64_t op;
    uint32_t n;

    if (!fkpy_arguments(&sig, args, n_args, kwnames, arg) ||
        !fkpy_u32(arg[1], "timeout_ms", &op_args.timeout_ms) ||
        !fkpy_keys(arg[0], &room, &keys, &n))
        return NULL;
    if (!begin(&c, self, false)) {
        fkpy_room_free(&room);
        return NULL;
    }
    int rc = flexkv_prefetch(self_of(self)->ns, keys, n, &op_args, &op);
    fkpy_call_end(&c);
    fkpy_room_free(&room);
    return rc ? fkpy_raise(fkpy_state_of(self), rc) : PyLong_FromUnsignedLongLong(op);
}

/* ---- the type ---- */

static PyMethodDef methods[] = {
    { "keys_from_tokens", FKPY_FASTCALL(keys_from_tokens),
      "keys_from_tokens(tokens, prev=None): 16 bytes for each whole block." },
    { "keys_from_hashes", FKPY_FASTCALL(keys_from_hashes),
      "keys_from_hashes(hashes): keys from the engine's own block hashes." },
    { "match", FKPY_FASTCALL(match), "match(keys): the longest known prefix, kept by a lease." },
    { "put", FKPY_FASTCALL(put),
      "put(keys, first, pages, timeout_ms=0, event_hashes=None, event_tokens=None, "
      "event_parent=None): stores blocks [first, number of keys)." },
    { "label", FKPY_FASTCALL(label),
      "label(lora_name=None, cache_salt=None): how routers know the namespace." },
    { "prefetch", FKPY_FASTCALL(prefetch),
      "prefetch(keys, timeout_ms=0): brings what is known into the cpu tier." },
    { 0 },
};

static PyType_Slot slots[] = {
    { Py_tp_doc, "An isolation domain of a space. Made by Space.namespace." },
    { Py_tp_dealloc, namespace_dealloc },
    { Py_tp_methods, methods },
    { 0 },
};
PyType_Spec fkpy_namespace_spec = {
    "flexkv.Namespace", sizeof(struct namespace), 0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, slots,
};
