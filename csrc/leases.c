/* SPDX-License-Identifier: BSD-3-Clause */
/* Leases: blocks to be read. */
#include "ends.h"

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
PyTypeObject LeaseType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "shmengine.Lease",
    .tp_basicsize = sizeof(Lease),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .tp_doc = "A committed block to be read; made by `Ring.lease`. `with` it: leaving releases.",
    .tp_dealloc = (destructor)lease_dealloc,
    .tp_methods = lease_methods,
    .tp_getset = lease_getset,
};
