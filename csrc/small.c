/* SPDX-License-Identifier: BSD-3-Clause */
/* Small messages through a socket, each in one call that runs no Python code between its steps.
 *
 *   Stream  what a session counts, and the two short ways through it: `send_small` and `take_small`
 *
 * What is not as almost always (no room, a new connection, somebody who waits, a large part) is left to Python
 * (sessions.py, ports.py).
 */
#include "wire.h"

#include <string.h>
#include <time.h>

#define PREFIX_BYTES 24 /* of a part: kind, number, how many were taken; sessions.py */
#define DATA 4
#define ACKNOWLEDGE 6
#define HEADER_BYTES 64 /* of a frame; codec.py */
#define CHECKED_FROM 8
#define KIND_PICKLE 1
#define KIND_ARRAY 3
#define MESSAGE_COST 256
#define SMALL_PART_BYTES 16920 /* a larger one is no small message, whatever is in it */
#define AFTER_BYTES 2 /* of a pickle of bytes: what follows these */
#define BATCH 64
#define MOST_AT_ONCE 16384
#define LOOK_EVERY 64
#define LOOK_NS 50000000

typedef struct {
    char magic[4];
    uint32_t crc;
    uint8_t version, kind;
    uint16_t flags;
    uint32_t producer;
    uint64_t in_band, total, checked, number;
    uint32_t parts, prefix;
    char unused[8];
} frame_header;
_Static_assert(sizeof(frame_header) == HEADER_BYTES, "as codec.py packs it");

static PyObject *name_popleft, *name_locked, *name_awake, *zero;

/* What a stream holds. */
static const size_t objects[] = {
    offsetof(Stream, kept),       offsetof(Stream, inbox),  offsetof(Stream, peer),       offsetof(Stream, wire),
    offsetof(Stream, lock),       offsetof(Stream, armed),  offsetof(Stream, raw),        offsetof(Stream, hub),
    offsetof(Stream, last.frame), offsetof(Stream, last.kind), offsetof(Stream, array_type), offsetof(Stream, encode),
    offsetof(Stream, expected),   offsetof(Stream, decode), offsetof(Stream, unknown)};
#define OBJECTS (sizeof objects / sizeof *objects)

static PyObject **object_at(Stream *self, size_t index) { return (PyObject **)((char *)self + objects[index]); }

static int stream_traverse(Stream *self, visitproc visit, void *arg) {
    for (size_t i = 0; i < OBJECTS; i++) Py_VISIT(*object_at(self, i));
    return 0;
}

static int stream_clear(Stream *self) {
    self->sends = self->receives = 0;
    for (size_t i = 0; i < OBJECTS; i++) Py_CLEAR(*object_at(self, i));
    return 0;
}

static void stream_dealloc(Stream *self) {
    PyObject_GC_UnTrack(self);
    stream_clear(self);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyObject *stream_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    (void)args;
    (void)kwargs;
    Stream *self = (Stream *)type->tp_alloc(type, 0);
    if (!self) return NULL;
    PyObject *collections = PyImport_ImportModule("collections");
    if (collections) {
        self->kept = PyObject_CallMethod(collections, "deque", NULL);
        self->inbox = PyObject_CallMethod(collections, "deque", NULL);
        Py_DECREF(collections);
    }
    self->peer = Py_NewRef(Py_None);
    if (!self->kept || !self->inbox) {
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

static PyObject *stream_use(Stream *self, PyObject *args) {
    PyObject *wire, *lock, *armed, *raw, *hub, *array_type, *encode, *expected, *decode, *unknown;
    int checks_all, allows_pickle;
    long long most_told;
    if (!PyArg_ParseTuple(args, "O!OO!OOOOO!OOppL", &WireType, &wire, &lock, &PySet_Type, &armed, &raw, &hub,
                          &array_type, &encode, &PyDict_Type, &expected, &decode, &unknown, &checks_all, &allows_pickle, &most_told))
        return NULL;
    Py_XSETREF(self->wire, (Wire *)Py_NewRef(wire));
    Py_XSETREF(self->lock, Py_NewRef(lock));
    Py_XSETREF(self->armed, Py_NewRef(armed));
    Py_XSETREF(self->raw, Py_NewRef(raw));
    Py_XSETREF(self->hub, Py_NewRef(hub));
    Py_XSETREF(self->array_type, Py_NewRef(array_type));
    Py_XSETREF(self->encode, Py_NewRef(encode));
    Py_XSETREF(self->expected, Py_NewRef(expected));
    Py_XSETREF(self->decode, Py_NewRef(decode));
    Py_XSETREF(self->unknown, Py_NewRef(unknown));
    self->checks_all = (char)checks_all;
    self->allows_pickle = (char)allows_pickle;
    self->most_told = most_told;
    self->sends = self->receives = 1;
    Py_RETURN_NONE;
}

/* Whether the socket is to be had for as long as the GIL is kept, with a connection, and the service awake. */
static int is_ready(Stream *self) {
    if (!PyBytes_CheckExact(self->peer) || !self->wire->socket || PySet_GET_SIZE(self->armed)) return 0;
    PyObject *locked = PyObject_CallMethodNoArgs(self->lock, name_locked);
    PyObject *awake = locked ? PyObject_GetAttr(self->hub, name_awake) : NULL;
    if (!awake) PyErr_Clear();
    int ready = locked == Py_False && awake == Py_True;
    Py_XDECREF(locked);
    Py_XDECREF(awake);
    return ready;
}

/* The same, and the socket has parts for this stream alone: no peer there has a name. */
static int may_pump(Stream *self) { return is_ready(self) && !PyBytes_GET_SIZE(self->peer); }

static long long item(PyObject *entry, Py_ssize_t index) { return PyLong_AsLongLong(PyTuple_GET_ITEM(entry, index)); }

/* The first or last entry of a deque of tuples, borrowed; NULL: it is empty. */
static PyObject *entry_of(PyObject *deque, Py_ssize_t index) {
    PyObject *entry = PyObject_Size(deque) > 0 ? PySequence_GetItem(deque, index) : NULL;
    Py_XDECREF(entry);
    return entry;
}

static long long next_number(Stream *self) {
    PyObject *last = entry_of(self->kept, -1);
    return last ? item(last, 0) + 1 : self->acknowledged;
}

static void drop_first(PyObject *deque) {
    PyObject *entry = PyObject_CallMethodNoArgs(deque, name_popleft);
    Py_XDECREF(entry);
}

/* Forget what is kept up to a number, or to the first part that is not bytes: the caller's then. NULL: there is none. */
static PyObject *let_go(Stream *self, long long until) {
    PyObject *entry;
    while ((entry = entry_of(self->kept, 0)) && item(entry, 0) < until) {
        PyObject *part = PyTuple_GET_ITEM(entry, 2);
        self->acknowledged = item(entry, 0) + 1;
        self->released = item(entry, 1);
        self->messages = item(entry, 3);
        self->answers = 1;
        PyObject *other = PyBytes_CheckExact(part) ? NULL : Py_NewRef(part);
        drop_first(self->kept);
        if (other) return other;
    }
    return NULL;
}

static PyObject *stream_let_go(Stream *self, PyObject *until) {
    int overflow; /* whoever says what was taken may say anything */
    long long number = PyLong_AsLongLongAndOverflow(until, &overflow);
    if (number == -1 && PyErr_Occurred()) return NULL;
    if (overflow > 0) number = INT64_MAX;
    PyObject *part = let_go(self, number);
    return part ? part : Py_NewRef(Py_None);
}

int stream_feed(Stream *self, Part *part, PyObject *entry) {
    size_t size = zmq.size(&part->message);
    if (size < PREFIX_BYTES || size > SMALL_PART_BYTES || self->peer == Py_None || zmq.more(&part->message)) return 0;
    uint64_t prefix[3];
    memcpy(prefix, zmq.data(&part->message), PREFIX_BYTES);
    int kind = prefix[0] & 0xff;
    if (kind != ACKNOWLEDGE && (kind != DATA || prefix[1] != (uint64_t)self->received)) return 0;
    long long cost = (long long)size + MESSAGE_COST;
    if (kind == DATA && self->waiting + cost > self->look_at) return 0;
    PyObject *first = entry_of(self->kept, 0), *last = entry_of(self->kept, -1);
    if (first && prefix[2] > (uint64_t)item(first, 0)) {
        /* Somebody, or a part that was kept, may wait for the room; and what is not bytes is used again. */
        if (self->handed_over != next_number(self) || !self->armed || PySet_GET_SIZE(self->armed)) return 0;
        if (!PyBytes_CheckExact(PyTuple_GET_ITEM(first, 2)) || !PyBytes_CheckExact(PyTuple_GET_ITEM(last, 2))) return 0;
        long long until = prefix[2] > INT64_MAX ? INT64_MAX : (long long)prefix[2];
        for (PyObject *other; (other = let_go(self, until));) Py_DECREF(other); /* large ones between small ones */
    }
    if (kind == ACKNOWLEDGE) return 1;
    PyTuple_SET_ITEM(entry, 0, PyLong_FromLongLong(self->received));
    PyTuple_SET_ITEM(entry, 1, PyLong_FromLong(DATA));
    PyTuple_SET_ITEM(entry, 2, Py_NewRef((PyObject *)part));
    if (PyErr_Occurred() || append(self->inbox, entry) < 0) return -1;
    self->received++;
    self->waiting += cost;
    return 1;
}

/* ---- Sending ----------------------------------------------------------------------------------------------------- */

/* The bytes of an object that is as the last one was, which alone differ in their frames; NULL: it is not. */
static const void *bytes_of(Stream *self, PyObject *obj) {
    Template *last = &self->last;
    if (!last->frame) return NULL;
    if (PyBytes_CheckExact(obj))
        return last->kind == (PyObject *)&PyBytes_Type && PyBytes_GET_SIZE(obj) == last->nbytes ? PyBytes_AS_STRING(obj)
                                                                                                 : NULL;
    if ((PyObject *)Py_TYPE(obj) != self->array_type) return NULL;
    PyArrayObject *array = (PyArrayObject *)obj;
    if ((PyObject *)PyArray_DESCR(array) != last->kind || PyArray_NDIM(array) != last->dimensions ||
        !(PyArray_FLAGS(array) & NPY_ARRAY_C_CONTIGUOUS))
        return NULL;
    for (int i = 0; i < last->dimensions; i++)
        if (PyArray_DIM(array, i) != last->shape[i]) return NULL;
    return PyArray_DATA(array);
}

/* Remember a frame for others alike, if the object's bytes are where they are expected in it. */
static void remember(Stream *self, PyObject *obj, PyObject *frame) {
    Template *last = &self->last;
    const char *data;
    Py_ssize_t nbytes, after = 0;
    PyObject *kind;
    if (PyBytes_CheckExact(obj)) {
        kind = (PyObject *)&PyBytes_Type;
        data = PyBytes_AS_STRING(obj);
        nbytes = PyBytes_GET_SIZE(obj);
        after = AFTER_BYTES;
    } else if ((PyObject *)Py_TYPE(obj) == self->array_type && PyArray_NDIM((PyArrayObject *)obj) <= MOST_DIMENSIONS) {
        PyArrayObject *array = (PyArrayObject *)obj;
        kind = (PyObject *)PyArray_DESCR(array);
        data = PyArray_DATA(array);
        PyObject *size = PyObject_GetAttrString(obj, "nbytes");
        nbytes = size ? PyLong_AsSsize_t(size) : 0;
        Py_XDECREF(size);
        last->dimensions = PyArray_NDIM(array);
        for (int i = 0; i < last->dimensions; i++) last->shape[i] = PyArray_DIM(array, i);
    } else {
        return;
    }
    Py_ssize_t at = PyBytes_GET_SIZE(frame) - after - nbytes;
    Py_CLEAR(last->frame);
    if (nbytes <= 0 || at < HEADER_BYTES || memcmp(PyBytes_AS_STRING(frame) + at, data, (size_t)nbytes) != 0) return;
    Py_XSETREF(last->kind, Py_NewRef(kind));
    last->frame = Py_NewRef(frame);
    last->at = at;
    last->nbytes = nbytes;
}

static void seal(unsigned char *frame, uint64_t nbytes, uint64_t number, int checks_all) {
    frame_header header;
    memcpy(&header, frame, HEADER_BYTES);
    header.number = number;
    if (checks_all) header.checked = nbytes - HEADER_BYTES;
    memcpy(frame, &header, HEADER_BYTES);
    header.crc = zmq.crc32c(0, frame + CHECKED_FROM, HEADER_BYTES - CHECKED_FROM + header.checked);
    memcpy(frame, &header, CHECKED_FROM);
}

/* A part with an object's frame, not sealed; NULL, without an exception: it is not small. */
static PyObject *part_of(Stream *self, PyObject *obj) {
    const void *data = bytes_of(self, obj);
    PyObject *frame = data ? Py_NewRef(self->last.frame) : PyObject_CallOneArg(self->encode, obj);
    if (!frame || !PyBytes_CheckExact(frame) || PyBytes_GET_SIZE(frame) < HEADER_BYTES) {
        Py_XDECREF(frame);
        return NULL;
    }
    Py_ssize_t nbytes = PyBytes_GET_SIZE(frame);
    PyObject *part = PyBytes_FromStringAndSize(NULL, PREFIX_BYTES + nbytes);
    if (part) {
        char *target = PyBytes_AS_STRING(part) + PREFIX_BYTES;
        memcpy(target, PyBytes_AS_STRING(frame), (size_t)nbytes);
        if (data)
            memcpy(target + self->last.at, data, (size_t)self->last.nbytes);
        else
            remember(self, obj, frame);
    }
    Py_DECREF(frame);
    return part;
}

/* Whether the connection has got a part. */
static int to_peer(Stream *self, const void *part, size_t nbytes) {
    void *socket = self->wire->socket;
    Py_ssize_t name = PyBytes_GET_SIZE(self->peer);
    if (name && zmq.send(socket, PyBytes_AS_STRING(self->peer), (size_t)name, DONTWAIT | SNDMORE) < 0) return 0;
    int sent = zmq.send(socket, part, nbytes, DONTWAIT) >= 0;
    if (name && !sent) self->wire->half = 1;
    return sent;
}

static PyObject *stream_send_small(Stream *self, PyObject *const *args, Py_ssize_t count) {
    if (count != 2) {
        PyErr_SetString(PyExc_TypeError, "send_small() takes an object and a time");
        return NULL;
    }
    long long looked = PyLong_AsLongLong(args[1]);
    if (looked == -1 && PyErr_Occurred()) return NULL;
    if (!self->sends) Py_RETURN_FALSE;
    PyObject *part = part_of(self, args[0]);
    if (!part) return PyErr_Occurred() ? NULL : Py_NewRef(Py_False);
    PyObject *entry = PyTuple_New(4);
    if (!entry) {
        Py_DECREF(part);
        return NULL;
    }
    PyTuple_SET_ITEM(entry, 2, part);
    if (next_number(self) % LOOK_EVERY == 0) {
        if (!may_pump(self)) goto unusual;
        if (wire_pump(self->wire, self->raw, MOST_AT_ONCE, self) < 0) goto failed;
    }

    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    Py_ssize_t nbytes = PyBytes_GET_SIZE(part);
    PyObject *last = entry_of(self->kept, -1);
    long long number = next_number(self);
    long long end = (last ? item(last, 1) : self->released) + nbytes + MESSAGE_COST;
    long long messages = last ? item(last, 3) : self->messages;
    if (!self->sends || self->handed_over != number || end - self->released > self->pace ||
        now.tv_sec * 1000000000LL + now.tv_nsec - looked > LOOK_NS || !is_ready(self) || self->wire->half)
        goto unusual;
    unsigned char *at = (unsigned char *)PyBytes_AS_STRING(part);
    uint64_t prefix[3] = {DATA, (uint64_t)number, (uint64_t)self->taken};
    memcpy(at, prefix, PREFIX_BYTES);
    seal(at + PREFIX_BYTES, (uint64_t)(nbytes - PREFIX_BYTES), (uint64_t)messages, self->checks_all);
    PyTuple_SET_ITEM(entry, 0, PyLong_FromLongLong(number));
    PyTuple_SET_ITEM(entry, 1, PyLong_FromLongLong(end));
    PyTuple_SET_ITEM(entry, 3, PyLong_FromLongLong(messages + 1));
    if (PyErr_Occurred() || append(self->kept, entry) < 0) goto failed;
    self->quick_sent++;
    self->quick_sent_bytes += (unsigned long long)(nbytes - PREFIX_BYTES);
    /* From here on it is sent. If the connection has just ended the service will give it to the next one. */
    if (to_peer(self, at, (size_t)nbytes)) {
        self->handed_over = self->handed_over_most = number + 1;
        self->told = self->taken;
        self->told_bytes = self->taken_bytes;
    }
    Py_DECREF(entry);
    Py_RETURN_TRUE;
unusual:
    Py_DECREF(entry);
    Py_RETURN_FALSE;
failed:
    Py_DECREF(entry);
    return NULL;
}

/* ---- Receiving --------------------------------------------------------------------------------------------------- */

/* Whether the checksum of a frame is right, and `decode` may know it. */
static int is_sound(Stream *self, const unsigned char *frame, uint64_t nbytes, frame_header *header) {
    if (nbytes < HEADER_BYTES) return 0;
    memcpy(header, frame, HEADER_BYTES);
    return memcmp(header->magic, "SHMF", 4) == 0 && header->version == 1 && header->flags == 0 &&
           (header->kind == KIND_ARRAY || (header->kind == KIND_PICKLE && self->allows_pickle)) &&
           header->total == nbytes && header->checked <= nbytes - HEADER_BYTES &&
           header->in_band <= header->checked && header->prefix <= header->checked - header->in_band &&
           zmq.crc32c(0, frame + CHECKED_FROM, HEADER_BYTES - CHECKED_FROM + header->checked) == header->crc;
}

/* Whether the short way may go on: nobody is on the long one, and no acknowledgement falls due with this message. */
static int may_take(Stream *self, long long nbytes) {
    return self->receives && self->taken + 1 - self->told < self->most_told &&
           self->taken_bytes + nbytes - self->told_bytes < self->acknowledge_bytes && is_ready(self);
}

static PyObject *stream_take(Stream *self, PyObject *box) {
    if (!PyList_Check(box)) {
        PyErr_SetString(PyExc_TypeError, "take_small() needs a list");
        return NULL;
    }
    if (!may_take(self, 0)) Py_RETURN_FALSE;
    if (PyObject_Size(self->inbox) == 0 && PyObject_Size(self->raw) == 0 && may_pump(self) &&
        wire_pump(self->wire, self->raw, BATCH, self) < 0)
        return NULL;
    PyObject *entry = entry_of(self->inbox, 0);
    if (!entry || item(entry, 0) != self->taken || item(entry, 1) != DATA ||
        !Py_IS_TYPE(PyTuple_GET_ITEM(entry, 2), &PartType))
        Py_RETURN_FALSE;
    zmq_msg *message = &((Part *)PyTuple_GET_ITEM(entry, 2))->message;
    uint64_t nbytes = zmq.size(message);
    const unsigned char *frame = (const unsigned char *)zmq.data(message) + PREFIX_BYTES;
    frame_header header;
    PyObject *expected = PyDict_GetItem(self->expected, zero); /* borrowed */
    /* What is decoded here should not be decoded once more on the long way: who knows what that does. */
    if (nbytes > SMALL_PART_BYTES || !may_take(self, (long long)nbytes) ||
        !is_sound(self, frame, nbytes - PREFIX_BYTES, &header) || (header.kind == KIND_PICKLE && header.parts) ||
        header.number != (uint64_t)(expected ? PyLong_AsLongLong(expected) : 0))
        Py_RETURN_FALSE;

    Py_INCREF(entry); /* from here to the next look Python runs: handlers of signals, other threads */
    PyObject *obj = PyObject_CallFunction(self->decode, "y#iIIK", (const char *)frame,
                                          (Py_ssize_t)(nbytes - PREFIX_BYTES), (int)header.kind, header.parts,
                                          header.prefix, (unsigned long long)header.in_band);
    PyObject *following = obj ? PyLong_FromUnsignedLongLong(header.number + 1) : NULL;
    int done = following && obj != self->unknown && entry_of(self->inbox, 0) == entry && may_take(self, (long long)nbytes);
    if (done && (PyList_Append(box, obj) < 0 || PyDict_SetItem(self->expected, zero, following) < 0)) done = 0;
    if (done) {
        drop_first(self->inbox);
        self->taken++;
        self->taken_bytes += (long long)nbytes;
        self->quick_received++;
        self->quick_received_bytes += nbytes - PREFIX_BYTES;
    }
    int failed = !following || PyErr_Occurred();
    Py_DECREF(entry);
    Py_XDECREF(obj);
    Py_XDECREF(following);
    return failed ? NULL : PyBool_FromLong(done);
}

#define COUNTER(name) {#name, T_LONGLONG, offsetof(Stream, name), 0, NULL}
#define HIDDEN(name) {"_" #name, T_LONGLONG, offsetof(Stream, name), 0, NULL}
static PyMemberDef stream_members[] = {
    {"_kept", Py_T_OBJECT_EX, offsetof(Stream, kept), Py_READONLY, NULL},
    {"_inbox", Py_T_OBJECT_EX, offsetof(Stream, inbox), Py_READONLY, NULL},
    {"peer", Py_T_OBJECT_EX, offsetof(Stream, peer), 0, NULL},
    {"answers", T_BOOL, offsetof(Stream, answers), 0, "the other end has been taking messages lately"},
    {"sends", T_BOOL, offsetof(Stream, sends), 0, "whether `send_small` may be used: nobody sends in another way"},
    {"receives", T_BOOL, offsetof(Stream, receives), 0, "whether `take_small` may be used"},
    HIDDEN(acknowledged),
    HIDDEN(messages),
    HIDDEN(released),
    HIDDEN(handed_over),
    HIDDEN(handed_over_most),
    COUNTER(received),
    HIDDEN(waiting),
    HIDDEN(look_at),
    COUNTER(pace),
    HIDDEN(taken),
    HIDDEN(taken_bytes),
    HIDDEN(told),
    HIDDEN(told_bytes),
    {"acknowledge_bytes", T_LONGLONG, offsetof(Stream, acknowledge_bytes), 0, "so many that were taken are told"},
    COUNTER(quick_sent),
    COUNTER(quick_sent_bytes),
    COUNTER(quick_received),
    COUNTER(quick_received_bytes),
    {NULL, 0, 0, 0, NULL}};
static PyMethodDef stream_methods[] = {
    {"use", (PyCFunction)stream_use, METH_VARARGS,
     "use($self, wire, lock, armed, raw, hub, array_type, encode, expected, decode, unknown, checks_all,\n"
     "    allows_pickle, most_told, /)\n--\n\nSay what `send_small` and `take_small` need, and let them be used."},
    {"send_small", (PyCFunction)(void (*)(void))stream_send_small, METH_FASTCALL,
     "send_small($self, obj, looked, /)\n--\n\nSend an object; False: it has to go the long way."},
    {"take_small", (PyCFunction)stream_take, METH_O,
     "take_small($self, box, /)\n--\n\nAppend the next message to a list, and have it taken; False: go the long way."},
    {"let_go", (PyCFunction)stream_let_go, METH_O,
     "let_go($self, until, /)\n--\n\nForget what is kept up to a number, or to the first part that is not bytes, and\n"
     "return that; or None."},
    {NULL, NULL, 0, NULL}};
PyTypeObject StreamType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "shmengine._native._handles.Stream",
    .tp_basicsize = sizeof(Stream),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .tp_doc = "Both directions of a session.",
    .tp_new = stream_new,
    .tp_dealloc = (destructor)stream_dealloc,
    .tp_traverse = (traverseproc)stream_traverse,
    .tp_clear = (inquiry)stream_clear,
    .tp_members = stream_members,
    .tp_methods = stream_methods,
};

int add_stream(PyObject *module) {
    name_popleft = PyUnicode_InternFromString("popleft");
    name_locked = PyUnicode_InternFromString("locked");
    name_awake = PyUnicode_InternFromString("_awake");
    zero = PyLong_FromLong(0);
    if (!name_popleft || !name_locked || !name_awake || !zero) return -1;
    return PyModule_AddType(module, &StreamType);
}
