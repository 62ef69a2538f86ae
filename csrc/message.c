/* SPDX-License-Identifier: BSD-3-Clause */
/* A leased block that arrays and memoryviews are made over: released when the last of them is gone.
 *
 * By the count of references, and by nothing written in Python: what a signal's handler raises cannot come in between.
 */
#include "handles.h"

static PyObject *message_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"region", "handle", "base", NULL};
    PyObject *region;
    unsigned long long handle, base;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OKK", names, &region, &handle, &base)) return NULL;
    Message *self = (Message *)type->tp_alloc(type, 0); /* all zero: nothing is leased */
    if (!self) return NULL;
    self->region = Py_NewRef(region);
    self->handle = (shmr *)(uintptr_t)handle;
    self->base = (char *)(uintptr_t)base;
    return (PyObject *)self;
}

Message *message_like(const Message *other) {
    Message *self = (Message *)MessageType.tp_alloc(&MessageType, 0);
    if (!self) return NULL;
    self->region = Py_NewRef(other->region);
    self->handle = other->handle;
    self->base = other->base;
    return self;
}

static void message_dealloc(Message *self) {
    if (self->block.state) core.release(self->handle, &self->block); /* STALE, FORKED: it is not ours any more */
    Py_XDECREF(self->region);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static int message_getbuffer(Message *self, Py_buffer *view, int flags) {
    if (!self->block.state) {
        view->obj = NULL;
        PyErr_SetString(PyExc_BufferError, "nothing is leased");
        return -1;
    }
    return PyBuffer_FillInfo(view, (PyObject *)self, self->base + self->block.offset, (Py_ssize_t)self->block.length, 1,
                             flags);
}

static PyObject *message_address(Message *self, void *unused) {
    (void)unused;
    return PyLong_FromVoidPtr(&self->block);
}

static PyBufferProcs message_buffer = {.bf_getbuffer = (getbufferproc)message_getbuffer};
static PyGetSetDef message_getset[] = {
    {"address", (getter)message_address, NULL, "Of its `shmr_block`, for a lease by the core.", NULL},
    {NULL, NULL, NULL, NULL, NULL}};
PyTypeObject MessageType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "shmengine._native._handles.Message",
    .tp_basicsize = sizeof(Message),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_doc = "The right to a leased block; a read-only buffer of its bytes. Released with the last that refers to it.",
    .tp_new = message_new,
    .tp_dealloc = (destructor)message_dealloc,
    .tp_as_buffer = &message_buffer,
    .tp_getset = message_getset,
};
