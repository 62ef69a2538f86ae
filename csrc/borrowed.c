/* SPDX-License-Identifier: BSD-3-Clause */
/* A part of a session that has come as a reference to memory which the other end lends (shmr_loan.c). */
#include "wire.h"

#include <string.h>

#define HELD_BYTES (64 << 10) /* for less it is not worth while to let go of the GIL */

struct loans loans;

static PyObject *fail;

/* connect_loans(fail, lend, has, copy, give_back) */
PyObject *connect_loans(PyObject *module, PyObject *args) {
    (void)module;
    PyObject *raise;
    unsigned long long lend, has, copy, give_back;
    if (!PyArg_ParseTuple(args, "OKKKK", &raise, &lend, &has, &copy, &give_back)) return NULL;
    Py_XSETREF(fail, Py_NewRef(raise));
    loans.lend = (int (*)(shmr_loans *, const shmr_piece *, uint32_t, shmr_loan *))(uintptr_t)lend;
    loans.has = (int (*)(const shmr_loans *, const shmr_loan *))(uintptr_t)has;
    loans.copy = (int (*)(shmr_loans *, const shmr_loan *, void *))(uintptr_t)copy;
    loans.give_back = (void (*)(shmr_loans *, const shmr_loan *))(uintptr_t)give_back;
    Py_RETURN_NONE;
}

Borrowed *borrowed_new(PyObject *owner, shmr_loans *handle, Py_ssize_t before, const void *reference) {
    shmr_loan loan;
    memcpy(&loan, reference, sizeof loan);
    if (!loans.has(handle, &loan)) return NULL;
    Borrowed *self = PyObject_New(Borrowed, BorrowedType);
    if (!self) return NULL;
    self->owner = Py_NewRef(owner);
    self->handle = handle;
    self->loan = loan;
    self->target = NULL;
    self->bytes = NULL;
    self->nbytes = before + (Py_ssize_t)loan.length;
    return self;
}

int borrowed_copy(Borrowed *self, PyObject *make, int lets_go_of_gil) {
    if (!self->target) {
        PyObject *target = PyObject_CallFunction(make, "K", (unsigned long long)self->loan.length);
        if (!target) return -1;
        if (self->target)
            Py_DECREF(target); /* a handler of a signal has been here */
        else
            self->target = target;
    }
    if (self->bytes) return 0;
    Py_buffer to;
    if (PyObject_GetBuffer(self->target, &to, PyBUF_WRITABLE) < 0) return -1;
    if ((uint64_t)to.len < self->loan.length) {
        PyBuffer_Release(&to);
        PyErr_SetString(PyExc_ValueError, "too little memory for what was lent");
        return -1;
    }
    int status;
    if (!lets_go_of_gil || self->loan.length <= HELD_BYTES) {
        status = loans.copy(self->handle, &self->loan, to.buf);
    } else {
        Py_BEGIN_ALLOW_THREADS
        status = loans.copy(self->handle, &self->loan, to.buf);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&to);
    if (status == SHMR_OK) {
        self->bytes = to.buf;
        return 0;
    }
    PyObject *raised = PyObject_CallFunction(fail, "is", status, "receive: memory that the other end has lent");
    Py_XDECREF(raised);
    return -1;
}

void borrowed_give_back(Borrowed *self) { loans.give_back(self->handle, &self->loan); }

static PyObject *new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    (void)type;
    PyObject *owner;
    unsigned long long handle;
    Py_ssize_t before;
    Py_buffer reference;
    static char *names[] = {"owner", "handle", "before", "reference", NULL};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OKny*", names, &owner, &handle, &before, &reference)) return NULL;
    PyObject *self = NULL;
    if (reference.len != sizeof(shmr_loan))
        PyErr_SetString(PyExc_ValueError, "a reference to memory that was lent has another length");
    else if (!(self = (PyObject *)borrowed_new(owner, (shmr_loans *)(uintptr_t)handle, before, reference.buf)) &&
             !PyErr_Occurred())
        PyErr_SetString(PyExc_ValueError, "a reference to memory that nobody has lent");
    PyBuffer_Release(&reference);
    return self;
}

static void dealloc(Borrowed *self) {
    PyTypeObject *type = Py_TYPE(self);
    Py_DECREF(self->owner);
    Py_XDECREF(self->target);
    PyObject_Free(self);
    Py_DECREF(type);
}

static Py_ssize_t length(Borrowed *self) { return self->nbytes; }

static PyObject *copy(Borrowed *self, PyObject *make) {
    return borrowed_copy(self, make, 1) < 0 ? NULL : Py_NewRef(self->target);
}

static PyObject *give_back(Borrowed *self, PyObject *unused) {
    (void)unused;
    borrowed_give_back(self);
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"copy", (PyCFunction)copy, METH_O,
     "copy($self, make, /)\n--\n\nReturn a copy of what was lent, in memory from `make`; the same one again, made once.\n\n"
     "A handler of a signal may raise before the caller has it, time and again: who began anew would never end."},
    {"give_back", (PyCFunction)give_back, METH_NOARGS,
     "give_back($self, /)\n--\n\nBe through with it; another call does no harm, as long as nothing that came later was\n"
     "given back."},
    {NULL, NULL, 0, NULL}};
static PyType_Slot slots[] = {{Py_tp_new, new},
                              {Py_tp_dealloc, dealloc},
                              {Py_tp_methods, methods},
                              {Py_sq_length, length},
                              {Py_tp_doc, "A part that has come as a reference to memory that was lent."},
                              {0, NULL}};
static PyType_Spec spec = {"shmengine._native._handles.Borrowed", sizeof(Borrowed), 0, Py_TPFLAGS_DEFAULT, slots};
PyTypeObject *BorrowedType;

int add_borrowed(PyObject *module) {
    BorrowedType = (PyTypeObject *)PyType_FromSpec(&spec);
    return BorrowedType ? PyModule_AddType(module, BorrowedType) : -1;
}
