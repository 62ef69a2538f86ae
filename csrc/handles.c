/* SPDX-License-Identifier: BSD-3-Clause */
/* Claims and leases as Python objects: the short way between `with ring.claim(...)` and the core.
 *
 * A cffi call costs as much as the core's work for a whole message, and a Python frame as much again, so what
 * happens for every message is here, and nothing else: at most some microseconds of spinning, where that has been
 * gaining, with the GIL held. A lease then sleeps here too, without the GIL, for a moment: who has slept finds the
 * caches cold, and is back the sooner the less code lies between the wake-up and the message. Whatever does not succeed
 * goes to Python (Ring._claim_slowly and its siblings), which waits through cffi.
 *
 *   End     one process's end of a ring: its layouts, its read-only arrays by place, handles to use again
 *   Layout  what follows from a shape and a dtype, and the writable arrays of that kind by place
 *   Claim   a block to be filled           Lease   a block to be read
 */
#include "ends.h"

#include <time.h>

struct handles_core core;

PyObject *lease_error;

static PyObject *ring_of(End *end) {
    PyObject *ring = PyWeakref_GetObject(end->ring); /* borrowed */
    if (!ring) return NULL;
    if (ring == Py_None) {
        PyErr_SetString(PyExc_ReferenceError, "the ring is gone");
        return NULL;
    }
    return Py_NewRef(ring);
}

int64_t monotonic_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

int64_t sleep_end(int64_t deadline) {
    int64_t end = monotonic_ns() + SLEEP_NS;
    return deadline < 0 || deadline > end ? end : deadline;
}

/* As status.deadline_of; the timeout is a good one. */
static int64_t deadline_of(PyObject *timeout) {
    if (timeout == Py_None) return -1;
    double seconds = PyFloat_AsDouble(timeout);
    return seconds == 0 ? 0 : monotonic_ns() + (int64_t)((seconds < 1e9 ? seconds : 1e9) * 1e9);
}

/* ---- End --------------------------------------------------------------------------------------------------------- */

static PyObject *end_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"ring", "region", "handle", "payload_check", "kept", NULL};
    PyObject *ring, *region, *kept;
    unsigned long long handle;
    int payload_check;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOKpO", names, &ring, &region, &handle, &payload_check, &kept))
        return NULL;
    End *self = (End *)type->tp_alloc(type, 0);
    if (!self) return NULL;
    self->ring = PyWeakref_NewRef(ring, NULL);
    self->region = Py_NewRef(region);
    self->kept = Py_NewRef(kept);
    self->layouts = PyDict_New();
    self->handle = (shmr *)(uintptr_t)handle;
    self->payload_check = payload_check;
    if (!self->ring || !self->layouts) {
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

static void forget_views(End *self) {
    for (int i = 0; i < PLACES; i++) {
        Py_CLEAR(self->views[i].array);
        Py_CLEAR(self->views[i].root);
    }
}

static void end_dealloc(End *self) {
    Lease *next;
    for (Lease *l = self->spare; l; l = next) {
        next = l->next;
        PyObject_Free(l);
    }
    forget_views(self);
    Py_XDECREF(self->kept);
    Py_XDECREF(self->layouts);
    Py_XDECREF(self->last_shape);
    Py_XDECREF(self->last_dtype);
    Py_XDECREF(self->last_layout);
    Py_XDECREF(self->ring);
    Py_XDECREF(self->region);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

/* Python says what is wrong with a timeout; here only whether something is. */
static int timeout_is_bad(PyObject *ring, PyObject *timeout) {
    if (timeout == Py_None) return 0;
    double seconds = PyFloat_AsDouble(timeout);
    if (seconds >= 0) return 0;
    PyErr_Clear();
    PyObject *deadline = PyObject_CallMethod(ring, "_deadline", "O", timeout);
    Py_XDECREF(deadline);
    return deadline == NULL;
}

/* What claim(shape, dtype=float, timeout=None) was called with; borrowed. */
static int parse_claim(PyObject *const *args, Py_ssize_t count, PyObject *names, PyObject **out) {
    static const char *const known[3] = {"shape", "dtype", "timeout"};
    out[0] = NULL;
    out[1] = (PyObject *)&PyFloat_Type;
    out[2] = Py_None;
    if (count > 3) {
        PyErr_Format(PyExc_TypeError, "claim() takes at most 3 arguments (%zd given)", count);
        return -1;
    }
    for (Py_ssize_t i = 0; i < count; i++) out[i] = args[i];
    for (Py_ssize_t i = 0; names && i < PyTuple_GET_SIZE(names); i++) {
        PyObject *name = PyTuple_GET_ITEM(names, i);
        int k = 0;
        while (k < 3 && PyUnicode_CompareWithASCIIString(name, known[k]) != 0) k++;
        if (k == 3 || k < count) {
            PyErr_Format(PyExc_TypeError, "claim() got an unexpected or a second argument '%U'", name);
            return -1;
        }
        out[k] = args[count + i];
    }
    if (out[0]) return 0;
    PyErr_SetString(PyExc_TypeError, "claim() needs a shape");
    return -1;
}

static PyObject *find_layout(End *self, PyObject *ring, PyObject *shape, PyObject *dtype) {
    if (shape == self->last_shape && dtype == self->last_dtype) return Py_NewRef(self->last_layout);
    PyObject *key = PyTuple_Pack(2, shape, dtype), *found = NULL;
    if (!key) return NULL;
    found = PyDict_GetItemWithError(self->layouts, key); /* borrowed */
    Py_DECREF(key);
    if (!found) { /* unknown, or not hashable */
        PyErr_Clear();
        return PyObject_CallMethod(ring, "_layout", "OO", shape, dtype);
    }
    if (((Layout *)found)->prefix) return Py_NewRef(found); /* the dtype may have fields, and get other names for them */
    Py_XSETREF(self->last_shape, Py_NewRef(shape));
    Py_XSETREF(self->last_dtype, Py_NewRef(dtype));
    Py_XSETREF(self->last_layout, Py_NewRef(found));
    return Py_NewRef(found);
}

static PyObject *end_claim(End *self, PyObject *const *arguments, Py_ssize_t count, PyObject *names) {
    PyObject *args[3];
    if (parse_claim(arguments, count, names, args) < 0) return NULL;
    PyObject *ring = ring_of(self);
    if (!ring) return NULL;
    PyObject *found = timeout_is_bad(ring, args[2]) ? NULL : find_layout(self, ring, args[0], args[1]);
    if (!found) {
        Py_DECREF(ring);
        return NULL;
    }
    Layout *layout = (Layout *)found;
    Claim *claim = layout->spare;
    if (claim) {
        layout->spare = claim->next;
        layout->spare_count--;
    } else {
        claim = PyObject_New(Claim, &ClaimType);
        if (!claim) {
            Py_DECREF(found);
            Py_DECREF(ring);
            return NULL;
        }
        memset(&claim->block, 0, sizeof claim->block);
        Py_ssize_t bytes = PyBytes_GET_SIZE(layout->spec);
        claim->block.kind = layout->prefix ? 2 : 1; /* KIND_ARRAY_PREFIX, KIND_ARRAY */
        if (!layout->prefix) {
            claim->block.spec_bytes = (uint32_t)bytes;
            memcpy(claim->block.spec, PyBytes_AS_STRING(layout->spec), (size_t)bytes);
        }
    }
    claim->array = NULL;
    claim->ring = ring;
    claim->layout = layout;
    claim->end = (End *)Py_NewRef((PyObject *)self);
    claim->timeout = Py_NewRef(args[2]);
    uint64_t need = layout->prefix + layout->nbytes;
    claim->block.length = need;
    /* At once, or else slowly. */
    if (core.claim(self->handle, need, NULL, 0, -1, 0, &claim->block) != SHMR_OK) {
        PyObject *done = PyObject_CallMethod(ring, "_claim_slowly", "NKO", address(&claim->block),
                                             (unsigned long long)need, args[2]);
        if (!done) {
            Py_DECREF(claim);
            return NULL;
        }
        Py_DECREF(done);
    }
    core.announce(self->handle, 0);
    uint32_t place = place_of(claim->block.offset);
    PyObject *array = layout->targets[place].array;
    if (array && layout->targets[place].offset == claim->block.offset) {
        set_writable(array, 1);
        claim->array = Py_NewRef(array);
        return (PyObject *)claim;
    }
    array = PyObject_CallMethod(ring, "_target", "OK", found, (unsigned long long)claim->block.offset);
    if (!array) {
        core.abort(self->handle, &claim->block);
        Py_DECREF(claim);
        return NULL;
    }
    claim->array = array;
    if (!layout->prefix) {
        Py_XSETREF(layout->targets[place].array, Py_NewRef(array));
        layout->targets[place].offset = claim->block.offset;
    }
    return (PyObject *)claim;
}

static PyObject *counted(End *self, Lease *lease) {
    self->leases++;
    self->bytes_leased += lease->block.length;
    return (PyObject *)lease;
}

/* lease(timeout=None) */
static PyObject *end_lease(End *self, PyObject *const *args, Py_ssize_t count, PyObject *names) {
    Py_ssize_t named = names ? PyTuple_GET_SIZE(names) : 0;
    if (count + named > 1 ||
        (named && PyUnicode_CompareWithASCIIString(PyTuple_GET_ITEM(names, 0), "timeout") != 0)) {
        PyErr_SetString(PyExc_TypeError, "lease() takes one argument, timeout");
        return NULL;
    }
    PyObject *timeout = count + named ? args[0] : Py_None;
    PyObject *ring = ring_of(self);
    if (!ring) return NULL;
    if (timeout_is_bad(ring, timeout)) {
        Py_DECREF(ring);
        return NULL;
    }
    Lease *lease = self->spare;
    if (lease) {
        self->spare = lease->next;
        self->spare_count--;
    } else {
        lease = PyObject_New(Lease, &LeaseType);
        if (!lease) {
            Py_DECREF(ring);
            return NULL;
        }
    }
    lease->ring = ring;
    lease->end = (End *)Py_NewRef((PyObject *)self);
    lease->array = NULL;
    lease->asked = lease->entered = 0;
    lease->block.state = 0;
    shmr_block *block = &lease->block;
    int status = SHMR_WOULD_BLOCK;
    if (!self->payload_check && PyObject_Size(self->kept) == 0) /* a checksum takes long: without the GIL then */
        status = core.lease(self->handle, 0, 0, brief(timeout), block);
    int64_t deadline = status == SHMR_OK ? 0 : deadline_of(timeout);
    if (status == SHMR_WOULD_BLOCK && deadline != 0 && PyObject_Size(self->kept) == 0) {
        int64_t end = sleep_end(deadline);
        Py_BEGIN_ALLOW_THREADS
        status = core.lease(self->handle, 0, self->payload_check, end, block);
        Py_END_ALLOW_THREADS
        if (status == SHMR_TIMEOUT && end != deadline) status = SHMR_WOULD_BLOCK;
    }
    if (status != SHMR_OK) {
        PyObject *done =
            PyObject_CallMethod(ring, "_lease_slowly", "NOiL", address(block), timeout, status, (long long)deadline);
        if (!done) {
            Py_DECREF(lease);
            return NULL;
        }
        Py_DECREF(done);
    }
    uint32_t place = place_of(block->offset);
    PyObject *array = self->views[place].array;
    /* A name that still holds the array of an earlier lease would look like an escape of this one. */
    if (array && self->views[place].offset == block->offset && self->views[place].length == block->length &&
        self->views[place].spec_bytes == block->spec_bytes &&
        memcmp(self->views[place].spec, block->spec, block->spec_bytes) == 0 && block->kind == 1 &&
        Py_REFCNT(array) == 1 && Py_REFCNT(self->views[place].root) == 2) {
        lease->array = Py_NewRef(array);
        return counted(self, lease);
    }
    PyObject *pair = PyObject_CallMethod(ring, "_read", "N", address(block));
    if (!pair) {
        Py_DECREF(lease); /* it was released, or is kept */
        return NULL;
    }
    lease->array = Py_NewRef(PyTuple_GET_ITEM(pair, 1));
    Py_XSETREF(self->views[place].root, Py_NewRef(PyTuple_GET_ITEM(pair, 0)));
    Py_XSETREF(self->views[place].array, Py_NewRef(lease->array));
    self->views[place].offset = block->offset;
    self->views[place].length = block->length;
    self->views[place].spec_bytes = block->spec_bytes;
    memcpy(self->views[place].spec, block->spec, block->spec_bytes);
    Py_DECREF(pair);
    return counted(self, lease);
}

static PyObject *end_forget(End *self, PyObject *unused) {
    (void)unused;
    forget_views(self);
    PyDict_Clear(self->layouts);
    Py_CLEAR(self->last_shape);
    Py_CLEAR(self->last_dtype);
    Py_CLEAR(self->last_layout);
    Py_RETURN_NONE;
}

/* ---- the module --------------------------------------------------------------------------------------------------- */

static PyMethodDef end_methods[] = {
    {"claim", (PyCFunction)(void (*)(void))end_claim, METH_FASTCALL | METH_KEYWORDS,
     "claim($self, /, shape, dtype=float, timeout=None)\n--\n\nSee `Ring.claim`."},
    {"lease", (PyCFunction)(void (*)(void))end_lease, METH_FASTCALL | METH_KEYWORDS,
     "lease($self, /, timeout=None)\n--\n\nSee `Ring.lease`."},
    {"forget", (PyCFunction)end_forget, METH_NOARGS, "Let go of all cached arrays and layouts."},
    {NULL, NULL, 0, NULL}};
static PyMemberDef end_members[] = {
    MEMBER(End, layouts),
    {"leases", Py_T_ULONGLONG, offsetof(End, leases), Py_READONLY, "messages that `lease` has handed out"},
    {"bytes_leased", Py_T_ULONGLONG, offsetof(End, bytes_leased), Py_READONLY, "their bytes"},
    {NULL, 0, 0, 0, NULL}};
static PyTypeObject EndType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "shmengine._native._handles.End",
    .tp_basicsize = sizeof(End),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_doc = "One process's end of a ring.",
    .tp_new = end_new,
    .tp_dealloc = (destructor)end_dealloc,
    .tp_methods = end_methods,
    .tp_members = end_members,
};

/* connect(LeaseError, claim, announce, commit, abort, lease, release, send, check_payload): where the core is */
static PyObject *connect(PyObject *module, PyObject *args) {
    (void)module;
    PyObject *error;
    unsigned long long claim, announce, commit, abort_, lease, release, send, check;
    if (!PyArg_ParseTuple(args, "OKKKKKKKK", &error, &claim, &announce, &commit, &abort_, &lease, &release, &send, &check))
        return NULL;
    Py_XSETREF(lease_error, Py_NewRef(error));
    core.claim = (int (*)(shmr *, uint64_t, const shmr_ref *, uint32_t, int, int64_t, shmr_block *))(uintptr_t)claim;
    core.announce = (void (*)(shmr *, uint32_t))(uintptr_t)announce;
    core.commit = (int (*)(shmr *, uint32_t, int, int, int64_t, shmr_block *))(uintptr_t)commit;
    core.abort = (int (*)(shmr *, shmr_block *))(uintptr_t)abort_;
    core.lease = (int (*)(shmr *, uint32_t, int, int64_t, shmr_block *))(uintptr_t)lease;
    core.release = (int (*)(shmr *, shmr_block *))(uintptr_t)release;
    core.send = (int (*)(shmr *, uint32_t, int, int64_t, const void *, shmr_block *))(uintptr_t)send;
    core.check_payload = (int (*)(shmr *, const shmr_block *))(uintptr_t)check;
    Py_RETURN_NONE;
}

static PyMethodDef module_methods[] = {{"connect", connect, METH_VARARGS, "Say where the core's functions are."},
                                       {"connect_zeromq", connect_zeromq, METH_VARARGS,
                                        "Say where ZeroMQ's functions are."},
                                       {"connect_loans", connect_loans, METH_VARARGS,
                                        "Say where the core's functions for memory that is lent are."},
                                       {"guard_stacks", guard_stacks, METH_VARARGS,
                                        "Come before the handlers of the signals that ask for a stack."},
                                       {"tell_stack", tell_stack, METH_VARARGS, "Handle the first of them."},
                                       {NULL, NULL, 0, NULL}};
static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, .m_name = "_handles", .m_doc = "Claims and leases.", .m_size = -1,
    .m_methods = module_methods};

PyMODINIT_FUNC PyInit__handles(void) {
    PyObject *m = PyModule_Create(&module);
    if (!m || PyModule_AddType(m, &EndType) < 0 || PyModule_AddType(m, &LayoutType) < 0 ||
        PyModule_AddType(m, &ClaimType) < 0 || PyModule_AddType(m, &LeaseType) < 0 ||
        PyModule_AddType(m, &MessageType) < 0 || PyModule_AddType(m, &InboxType) < 0 ||
        PyModule_AddType(m, &OutboxType) < 0 || directions_init() < 0 || add_wire(m) < 0) {
        Py_XDECREF(m);
        return NULL;
    }
    return m;
}
