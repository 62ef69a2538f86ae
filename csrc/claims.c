/* SPDX-License-Identifier: BSD-3-Clause */
/* Claims: blocks to be filled. And layouts: what follows from a shape and a dtype. */
#include "ends.h"

/* ---- Layout ----------------------------------------------------------------------------------------------------- */

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

/* ---- their types -------------------------------------------------------------------------------------------------- */

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
PyTypeObject ClaimType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "shmengine.Claim",
    .tp_basicsize = sizeof(Claim),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .tp_doc = "A block to be filled; made by `Ring.claim`. `with` it: leaving commits, an exception aborts.",
    .tp_dealloc = (destructor)claim_dealloc,
    .tp_methods = claim_methods,
    .tp_getset = claim_getset,
};

static PyMemberDef layout_members[] = {
    MEMBER(Layout, dtype),
    MEMBER(Layout, shape),
    MEMBER(Layout, spec),
    {"prefix", Py_T_ULONGLONG, offsetof(Layout, prefix), Py_READONLY, "bytes of payload before the array"},
    {"nbytes", Py_T_ULONGLONG, offsetof(Layout, nbytes), Py_READONLY, "bytes of the array"},
    {NULL, 0, 0, 0, NULL}};
PyTypeObject LayoutType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "shmengine._native._handles.Layout",
    .tp_basicsize = sizeof(Layout),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_doc = "Everything that follows from a shape and a dtype.",
    .tp_new = layout_new,
    .tp_dealloc = (destructor)layout_dealloc,
    .tp_members = layout_members,
};
