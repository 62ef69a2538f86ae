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
#include "handles.h"

#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#include <numpy/ndarraytypes.h>
#include <time.h>

#define PLACES 256 /* of the direct-mapped tables below */
#define SPARE_MAX 16

struct handles_core core;

static PyObject *lease_error; /* shmengine.errors.LeaseError */

static uint32_t place_of(uint64_t offset) {
    return (uint32_t)((offset >> 6) * UINT64_C(0x9e3779b97f4a7c15) >> 56) % PLACES;
}

/* ---- Layout ----------------------------------------------------------------------------------------------------- */

struct claim;

typedef struct {
    PyObject_HEAD
    PyObject *dtype, *shape, *spec;
    uint64_t prefix, nbytes;
    struct {
        uint64_t offset;
        PyObject *array;
    } targets[PLACES];
    struct claim *spare;
    int spare_count;
} Layout;

static PyObject *layout_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"dtype", "shape", "spec", "prefix", "nbytes", NULL};
    PyObject *dtype, *shape, *spec;
    unsigned long long prefix, nbytes;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOSKK", names, &dtype, &shape, &spec, &prefix, &nbytes))
        return NULL;
    Layout *self = (Layout *)type->tp_alloc(type, 0);
    if (!self) return NULL;
    self->dtype = Py_NewRef(dtype);
    self->shape = Py_NewRef(shape);
    self->spec = Py_NewRef(spec);
    self->prefix = prefix;
    self->nbytes = nbytes;
    return (PyObject *)self;
}

/* ---- Claim ------------------------------------------------------------------------------------------------------ */

typedef struct {
    PyObject_HEAD
    PyObject *ring; /* weak */
    PyObject *region;
    PyObject *kept;    /* messages that nobody got, because a signal's handler raised: they come first */
    PyObject *layouts; /* (shape, dtype) -> Layout */
    PyObject *last_shape, *last_dtype, *last_layout; /* who sends one kind of array often sends the same objects */
    shmr *handle;
    int payload_check;
    unsigned long long leases, bytes_leased; /* so far */
    struct {
        uint64_t offset, length;
        uint32_t spec_bytes;
        unsigned char spec[128];
        PyObject *root, *array;
    } views[PLACES];
    struct lease *spare;
    int spare_count;
} End;

typedef struct claim {
    PyObject_HEAD
    PyObject *ring; /* strong while in use */
    End *end;
    Layout *layout;
    PyObject *array, *timeout;
    struct claim *next;
    shmr_block block;
} Claim;

typedef struct lease {
    PyObject_HEAD
    PyObject *ring;
    End *end;
    PyObject *array;
    struct lease *next;
    int asked, entered;
    shmr_block block;
} Lease;

static PyTypeObject ClaimType, LeaseType;

static PyObject *ring_of(End *end) {
    PyObject *ring = PyWeakref_GetObject(end->ring); /* borrowed */
    if (!ring) return NULL;
    if (ring == Py_None) {
        PyErr_SetString(PyExc_ReferenceError, "the ring is gone");
        return NULL;
    }
    return Py_NewRef(ring);
}

static PyObject *address(shmr_block *block) { return PyLong_FromVoidPtr(block); }

int64_t monotonic_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

int64_t sleep_end(int64_t deadline) {
    int64_t end = monotonic_ns() + SLEEP_NS;
    return deadline < 0 || deadline > end ? end : deadline;
}

/* Whoever may wait spins a little first: a partner on another core answers within a microsecond. */
static int64_t brief(PyObject *timeout) {
    return timeout != Py_None && PyFloat_AsDouble(timeout) == 0 ? 0 : SHMR_BRIEFLY;
}

/* As status.deadline_of; the timeout is a good one. */
static int64_t deadline_of(PyObject *timeout) {
    if (timeout == Py_None) return -1;
    double seconds = PyFloat_AsDouble(timeout);
    return seconds == 0 ? 0 : monotonic_ns() + (int64_t)((seconds < 1e9 ? seconds : 1e9) * 1e9);
}

static int ended(const char *what, const char *how) {
    PyErr_Format(lease_error, "this %s has ended: it was %s", what, how);
    return -1;
}

static void set_writable(PyObject *array, int writable) {
    if (writable)
        PyArray_ENABLEFLAGS((PyArrayObject *)array, NPY_ARRAY_WRITEABLE);
    else
        PyArray_CLEARFLAGS((PyArrayObject *)array, NPY_ARRAY_WRITEABLE);
}

static void claim_clear(Claim *self) {
    Py_CLEAR(self->ring);
    Py_CLEAR(self->timeout);
}

static int claim_abort_now(Claim *self) {
    set_writable(self->array, 0);
    Py_CLEAR(self->array);
    int status = core.abort(self->end->handle, &self->block);
    if (status == SHMR_STALE || status == SHMR_FORKED) {
        PyErr_SetString(lease_error, "abort of a claim: it is not, or no longer, held by this process");
        return -1;
    }
    return 0;
}

static int claim_commit_now(Claim *self) {
    set_writable(self->array, 0); /* what is committed belongs to the reader */
    Py_CLEAR(self->array);
    int status = SHMR_WOULD_BLOCK;
    if (!self->end->payload_check) /* a checksum takes long: without the GIL then */
        status = core.commit(self->end->handle, 0, 0, -1, brief(self->timeout), &self->block);
    if (status == SHMR_OK) return 0;
    PyObject *done = PyObject_CallMethod(self->ring, "_commit_slowly", "NO", address(&self->block), self->timeout);
    Py_XDECREF(done);
    return done ? 0 : -1;
}

static PyObject *claim_array(Claim *self, void *unused) {
    (void)unused;
    if (!self->array) {
        ended("claim", "committed or aborted");
        return NULL;
    }
    return Py_NewRef(self->array);
}

static PyObject *claim_enter(Claim *self, PyObject *unused) {
    (void)unused;
    return claim_array(self, NULL);
}

static PyObject *claim_commit(Claim *self, PyObject *unused) {
    (void)unused;
    if (!self->array) {
        ended("claim", "committed or aborted");
        return NULL;
    }
    if (claim_commit_now(self) < 0) return NULL;
    Py_RETURN_NONE;
}

static PyObject *claim_abort(Claim *self, PyObject *unused) {
    (void)unused;
    if (!self->array) {
        ended("claim", "committed or aborted");
        return NULL;
    }
    if (claim_abort_now(self) < 0) return NULL;
    Py_RETURN_NONE;
}

static PyObject *claim_exit(Claim *self, PyObject *const *args, Py_ssize_t count) {
    int failed = count > 0 && args[0] != Py_None;
    if (!failed && !self->array) {
        ended("claim", "committed or aborted");
        return NULL;
    }
    if (self->array && (failed ? claim_abort_now(self) : claim_commit_now(self)) < 0) return NULL;
    Py_RETURN_NONE;
}

/* Nobody has it any more. If it was never committed, nobody can: abort. Then it is kept for the next claim. */
static void claim_dealloc(Claim *self) {
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    if (self->array && claim_abort_now(self) < 0) PyErr_Clear();
    claim_clear(self);
    Layout *layout = self->layout;
    if (layout && layout->spare_count < SPARE_MAX && Py_REFCNT((PyObject *)layout) > 1) {
        Py_SET_REFCNT((PyObject *)self, 1); /* resurrected, as the spare list's */
        self->next = layout->spare;
        layout->spare = self;
        layout->spare_count++;
        self->layout = NULL; /* or the two would keep each other */
        Py_CLEAR(self->end);
        Py_DECREF((PyObject *)layout);
    } else {
        Py_XDECREF((PyObject *)self->end);
        Py_XDECREF((PyObject *)layout);
        PyObject_Free(self);
    }
    PyErr_Restore(type, value, trace);
}

static void layout_dealloc(Layout *self) {
    Claim *next;
    for (Claim *c = self->spare; c; c = next) {
        next = c->next;
        PyObject_Free(c);
    }
    for (int i = 0; i < PLACES; i++) Py_XDECREF(self->targets[i].array);
    Py_XDECREF(self->dtype);
    Py_XDECREF(self->shape);
    Py_XDECREF(self->spec);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

/* ---- Lease ------------------------------------------------------------------------------------------------------ */

static PyObject *lease_array(Lease *self, void *unused) {
    (void)unused;
    if (!self->array) {
        ended("lease", "released");
        return NULL;
    }
    self->asked = 1;
    return Py_NewRef(self->array);
}

static PyObject *lease_attempts(Lease *self, void *unused) {
    (void)unused;
    return PyLong_FromUnsignedLong(self->block.attempts);
}

static PyObject *lease_enter(Lease *self, PyObject *unused) {
    (void)unused;
    if (!self->array) {
        ended("lease", "released");
        return NULL;
    }
    self->entered = 1;
    return Py_NewRef(self->array);
}

/* `named`: one more reference is the name after `as`. If there are others, the last view releases the block. */
static int lease_release_now(Lease *self, int named) {
    End *end = self->end;
    uint32_t place = place_of(self->block.offset);
    PyObject *array = self->array;
    self->array = NULL;
    int cached = end->views[place].array == array; /* else the counts say nothing */
    if (cached && Py_REFCNT(array) <= 2 + named && Py_REFCNT(end->views[place].root) <= 2) {
        Py_DECREF(array);
        if (core.release(end->handle, &self->block) != SHMR_OK) {
            PyErr_SetString(lease_error, "release of a lease: it is not, or no longer, held by this process");
            return -1;
        }
        return 0;
    }
    if (cached) {
        Py_CLEAR(end->views[place].array);
        Py_CLEAR(end->views[place].root);
    }
    /* The views outlive this handle, so they get a block of their own. */
    PyObject *copy = PyBytes_FromStringAndSize((const char *)&self->block, sizeof self->block);
    PyObject *done = copy ? PyObject_CallMethod(self->ring, "_release_late", "OO", array, copy) : NULL;
    Py_XDECREF(copy);
    if (!done) { /* out of memory: the lease goes on, and may be released again */
        self->array = array;
        return -1;
    }
    self->block.state = 0; /* theirs now */
    Py_DECREF(done);
    Py_DECREF(array);
    return 0;
}

static PyObject *lease_release(Lease *self, PyObject *unused) {
    (void)unused;
    if (!self->array) {
        ended("lease", "released");
        return NULL;
    }
    if (lease_release_now(self, 0) < 0) return NULL;
    Py_RETURN_NONE;
}

static PyObject *lease_exit(Lease *self, PyObject *const *args, Py_ssize_t count) {
    (void)args;
    (void)count;
    /* Whoever asked for `array` may have no name after `as`, only others. */
    if (self->array && lease_release_now(self, !self->asked) < 0) return NULL;
    Py_RETURN_NONE;
}

static void lease_dealloc(Lease *self) {
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    if (type && self->block.state && !self->asked && !self->entered) { /* an exception on the way to whoever leases */
        PyObject *done = PyObject_CallMethod(self->ring, "_keep", "N", address(&self->block));
        if (!done) PyErr_Clear();
        Py_XDECREF(done);
        Py_CLEAR(self->array);
    } else if (self->array && lease_release_now(self, 0) < 0) {
        PyErr_Clear();
        Py_CLEAR(self->array);
    }
    Py_CLEAR(self->ring);
    End *end = self->end;
    if (end && end->spare_count < SPARE_MAX && Py_REFCNT((PyObject *)end) > 1) {
        Py_SET_REFCNT((PyObject *)self, 1); /* resurrected, as the spare list's */
        self->next = end->spare;
        end->spare = self;
        end->spare_count++;
        self->end = NULL;
        Py_DECREF((PyObject *)end);
    } else {
        Py_XDECREF((PyObject *)end);
        PyObject_Free(self);
    }
    PyErr_Restore(type, value, trace);
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

static PyMethodDef claim_methods[] = {
    {"__enter__", (PyCFunction)claim_enter, METH_NOARGS, NULL},
    {"__exit__", (PyCFunction)(void (*)(void))claim_exit, METH_FASTCALL, NULL},
    {"commit", (PyCFunction)claim_commit, METH_NOARGS,
     "Hand the block over; waits while the ring is full, up to the timeout given to `Ring.claim`.\n\n"
     "Raises\n------\nTimeout, WouldBlock\n    The ring stayed full; the claim is aborted.\n"
     "LeaseError\n    The claim has ended already."},
    {"abort", (PyCFunction)claim_abort, METH_NOARGS,
     "Give the block back; nobody will see it.\n\nRaises\n------\nLeaseError\n    The claim has ended already."},
    {NULL, NULL, 0, NULL}};
static PyGetSetDef claim_getset[] = {
    {"array", (getter)claim_array, NULL, "The memory to fill: writable, over the block's memory, uninitialised.", NULL},
    {NULL, NULL, NULL, NULL, NULL}};
static PyTypeObject ClaimType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "shmengine.Claim",
    .tp_basicsize = sizeof(Claim),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .tp_doc = "A block to be filled; made by `Ring.claim`. `with` it: leaving commits, an exception aborts.",
    .tp_dealloc = (destructor)claim_dealloc,
    .tp_methods = claim_methods,
    .tp_getset = claim_getset,
};

static PyMethodDef lease_methods[] = {
    {"__enter__", (PyCFunction)lease_enter, METH_NOARGS, NULL},
    {"__exit__", (PyCFunction)(void (*)(void))lease_exit, METH_FASTCALL, NULL},
    {"release", (PyCFunction)lease_release, METH_NOARGS,
     "Give the block back, at once if no view of it is in use elsewhere, else with the last view.\n\n"
     "Raises\n------\nLeaseError\n    The lease has ended already, or belongs to the parent of this forked process."},
    {NULL, NULL, 0, NULL}};
static PyGetSetDef lease_getset[] = {
    {"array", (getter)lease_array, NULL, "The memory to read: read-only for good, over the block's memory.", NULL},
    {"attempts", (getter)lease_attempts, NULL,
     "How often the message had been delivered to somebody who died before releasing it.", NULL},
    {NULL, NULL, NULL, NULL, NULL}};
static PyTypeObject LeaseType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "shmengine.Lease",
    .tp_basicsize = sizeof(Lease),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .tp_doc = "A committed block to be read; made by `Ring.lease`. `with` it: leaving releases.",
    .tp_dealloc = (destructor)lease_dealloc,
    .tp_methods = lease_methods,
    .tp_getset = lease_getset,
};

#define MEMBER(type, name) {#name, Py_T_OBJECT_EX, offsetof(type, name), Py_READONLY, NULL}
static PyMemberDef layout_members[] = {
    MEMBER(Layout, dtype),
    MEMBER(Layout, shape),
    MEMBER(Layout, spec),
    {"prefix", Py_T_ULONGLONG, offsetof(Layout, prefix), Py_READONLY, "bytes of payload before the array"},
    {"nbytes", Py_T_ULONGLONG, offsetof(Layout, nbytes), Py_READONLY, "bytes of the array"},
    {NULL, 0, 0, 0, NULL}};
static PyTypeObject LayoutType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "shmengine._native._handles.Layout",
    .tp_basicsize = sizeof(Layout),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_doc = "Everything that follows from a shape and a dtype.",
    .tp_new = layout_new,
    .tp_dealloc = (destructor)layout_dealloc,
    .tp_members = layout_members,
};

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

/* connect(LeaseError, claim, commit, abort, lease, release, send, check_payload): where the core is */
static PyObject *connect(PyObject *module, PyObject *args) {
    (void)module;
    PyObject *error;
    unsigned long long claim, commit, abort_, lease, release, send, check;
    if (!PyArg_ParseTuple(args, "OKKKKKKK", &error, &claim, &commit, &abort_, &lease, &release, &send, &check))
        return NULL;
    Py_XSETREF(lease_error, Py_NewRef(error));
    core.claim = (int (*)(shmr *, uint64_t, const shmr_ref *, uint32_t, int, int64_t, shmr_block *))(uintptr_t)claim;
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
