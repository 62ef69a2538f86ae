/* SPDX-License-Identifier: BSD-3-Clause */
/* A socket of pyzmq's, used beside it: parts are taken out of it in one call that no handler of a signal interrupts.
 *
 *   Wire    the socket      Part    what it has brought, or takes: a message of ZeroMQ
 */
#include "wire.h"

#include <errno.h>

struct zmq zmq;

static PyObject *name_append;

/* connect_zeromq(crc32c, msg_init, msg_close, msg_more, msg_get, msg_size, msg_data, msg_recv, msg_send, msg_init_size,
 * msg_copy, send) */
PyObject *connect_zeromq(PyObject *module, PyObject *args) {
    (void)module;
    unsigned long long at[12];
    if (!PyArg_ParseTuple(args, "KKKKKKKKKKKK", &at[0], &at[1], &at[2], &at[3], &at[4], &at[5], &at[6], &at[7], &at[8],
                          &at[9], &at[10], &at[11]))
        return NULL;
    zmq.crc32c = (uint32_t(*)(uint32_t, const void *, uint64_t))(uintptr_t)at[0];
    zmq.init = (int (*)(zmq_msg *))(uintptr_t)at[1];
    zmq.close = (int (*)(zmq_msg *))(uintptr_t)at[2];
    zmq.more = (int (*)(const zmq_msg *))(uintptr_t)at[3];
    zmq.get = (int (*)(const zmq_msg *, int))(uintptr_t)at[4];
    zmq.size = (size_t(*)(const zmq_msg *))(uintptr_t)at[5];
    zmq.data = (void *(*)(zmq_msg *))(uintptr_t)at[6];
    zmq.recv = (int (*)(zmq_msg *, void *, int))(uintptr_t)at[7];
    zmq.send_msg = (int (*)(zmq_msg *, void *, int))(uintptr_t)at[8];
    zmq.init_size = (int (*)(zmq_msg *, size_t))(uintptr_t)at[9];
    zmq.copy = (int (*)(zmq_msg *, zmq_msg *))(uintptr_t)at[10];
    zmq.send = (int (*)(void *, const void *, size_t, int))(uintptr_t)at[11];
    Py_RETURN_NONE;
}

int append(PyObject *deque, PyObject *entry) {
    PyObject *done = PyObject_CallMethodOneArg(deque, name_append, entry);
    Py_XDECREF(done);
    return done ? 0 : -1;
}

/* ---- Part -------------------------------------------------------------------------------------------------------- */

Part *part_new(size_t nbytes) {
    Part *part = PyObject_New(Part, &PartType);
    if (!part) return NULL;
    if (zmq.init_size(&part->message, nbytes) == 0) return part;
    PyObject_Free(part);
    PyErr_NoMemory();
    return NULL;
}

static void part_dealloc(Part *self) {
    zmq.close(&self->message);
    PyObject_Free(self);
}

static int part_getbuffer(Part *self, Py_buffer *view, int flags) {
    zmq_msg *message = &self->message;
    return PyBuffer_FillInfo(view, (PyObject *)self, zmq.data(message), (Py_ssize_t)zmq.size(message), 0, flags);
}

static Py_ssize_t part_length(Part *self) { return (Py_ssize_t)zmq.size(&self->message); }

static PyObject *part_more(Part *self, void *unused) {
    (void)unused;
    return PyBool_FromLong(zmq.more(&self->message));
}

static PyObject *part_source(Part *self, void *unused) {
    (void)unused;
    return PyLong_FromLong(zmq.get(&self->message, SRCFD));
}

static PyBufferProcs part_buffer = {.bf_getbuffer = (getbufferproc)part_getbuffer};
static PySequenceMethods part_sequence = {.sq_length = (lenfunc)part_length};
static PyGetSetDef part_getset[] = {
    {"more", (getter)part_more, NULL, "Whether another part of the same message follows.", NULL},
    {"source", (getter)part_source, NULL, "The descriptor of the connection that has brought it.", NULL},
    {NULL, NULL, NULL, NULL, NULL}};
PyTypeObject PartType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "shmengine._native._handles.Part",
    .tp_basicsize = sizeof(Part),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .tp_doc = "A message of ZeroMQ, that a socket has brought, or that it takes: a buffer.",
    .tp_dealloc = (destructor)part_dealloc,
    .tp_as_buffer = &part_buffer,
    .tp_as_sequence = &part_sequence,
    .tp_getset = part_getset,
};

/* ---- Wire -------------------------------------------------------------------------------------------------------- */

static int pump(Wire *self, PyObject *raw, long long most, Stream *stream) {
    int quick = stream && PyObject_Size(raw) == 0;
    for (long long count = 0; most < 0 || count < most; count++) {
        PyObject *entry = quick ? PyTuple_New(3) : NULL;
        Part *part = PyObject_New(Part, &PartType);
        if (!part || (quick && !entry)) {
            if (part) PyObject_Free(part);
            Py_XDECREF(entry);
            return -1;
        }
        zmq.init(&part->message);
        int size, failed = 0;
        do {
            errno = ENOTSOCK;
            size = self->socket ? zmq.recv(&part->message, self->socket, DONTWAIT) : -1;
        } while (size < 0 && errno == EINTR);
        if (size < 0) {
            failed = errno;
        } else {
            int fed = quick ? stream_feed(stream, part, entry) : 0;
            if (fed == 0) {
                quick = 0;
                fed = append(raw, (PyObject *)part);
            }
            if (fed < 0) failed = -1;
        }
        Py_XDECREF(entry);
        Py_DECREF((PyObject *)part);
        if (failed == EAGAIN) return 0;
        if (failed > 0) {
            errno = failed;
            PyErr_SetFromErrno(PyExc_OSError);
        }
        if (failed) return -1;
    }
    return 1;
}

int wire_pump(Wire *self, PyObject *raw, long long most, Stream *stream) {
    int collects = PyGC_Disable(); /* a collection may run any code, between two parts as well */
    int more = pump(self, raw, most, stream);
    if (collects) PyGC_Enable();
    return more;
}

static PyObject *wire_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"socket", NULL};
    unsigned long long socket;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "K", names, &socket)) return NULL;
    Wire *self = (Wire *)type->tp_alloc(type, 0);
    if (self) self->socket = (void *)(uintptr_t)socket;
    return (PyObject *)self;
}

static PyObject *wire_receive(Wire *self, PyObject *args) {
    PyObject *raw, *stream;
    long long most;
    if (!PyArg_ParseTuple(args, "OLO", &raw, &most, &stream)) return NULL;
    if (stream != Py_None && !PyObject_TypeCheck(stream, &StreamType)) {
        PyErr_SetString(PyExc_TypeError, "receive() feeds a Stream, or None");
        return NULL;
    }
    int more = wire_pump(self, raw, most, stream == Py_None ? NULL : (Stream *)stream);
    return more < 0 ? NULL : PyBool_FromLong(more);
}

static PyObject *wire_close(Wire *self, PyObject *unused) {
    (void)unused;
    self->socket = NULL;
    Py_RETURN_NONE;
}

static PyMemberDef wire_members[] = {
    {"half", T_BOOL, offsetof(Wire, half), 0, "whether of a message perhaps only the address was sent"},
    {NULL, 0, 0, 0, NULL}};
static PyMethodDef wire_methods[] = {
    {"receive", (PyCFunction)wire_receive, METH_VARARGS,
     "receive($self, raw, most, stream, /)\n--\n\nTake out up to so many parts (-1: all); True: there may be more.\n\n"
     "Those that suit a stream go to that, up to the first that does not; the rest is appended to `raw`."},
    {"close", (PyCFunction)wire_close, METH_NOARGS, "Use the socket no more; before it is closed."},
    {NULL, NULL, 0, NULL}};
PyTypeObject WireType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "shmengine._native._handles.Wire",
    .tp_basicsize = sizeof(Wire),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_doc = "A socket of ZeroMQ, by its address.",
    .tp_new = wire_new,
    .tp_members = wire_members,
    .tp_methods = wire_methods,
};

int add_wire(PyObject *module) {
    name_append = PyUnicode_InternFromString("append");
    if (!name_append || PyModule_AddType(module, &WireType) < 0 || PyModule_AddType(module, &PartType) < 0) return -1;
    return add_borrowed(module) < 0 ? -1 : add_stream(module);
}
