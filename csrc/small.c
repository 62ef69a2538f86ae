/* SPDX-License-Identifier: BSD-3-Clause */
/* Messages through a socket, small ones and such that are lent, each in one call that runs no Python code between its
 * steps.
 *
 *   Stream  what a session counts, and the two short ways through it: `send_small` (sending.c) and `take_small`
 *
 * What is not as almost always (no room, a new connection, somebody who waits, a large part) is left to Python
 * (sessions.py, ports.py).
 */
#include "wire.h"

#include <string.h>

#define IN_PLACE_BYTES 8500 /* from here on ZeroMQ has read a part to memory of its own: an array is used there */
#define ALIGNMENT 16        /* that it needs for that */
#define BATCH 64

static PyObject *name_popleft, *name_locked, *name_awake, *zero;

/* What a stream holds. */
static const size_t objects[] = {
    offsetof(Stream, kept),       offsetof(Stream, inbox),  offsetof(Stream, peer),       offsetof(Stream, wire),
    offsetof(Stream, lock),       offsetof(Stream, armed),  offsetof(Stream, raw),        offsetof(Stream, hub),
    offsetof(Stream, last.beginning),  offsetof(Stream, last.kind), offsetof(Stream, array_type), offsetof(Stream, begin),
    offsetof(Stream, encode),     offsetof(Stream, expected), offsetof(Stream, decode),   offsetof(Stream, unknown),
    offsetof(Stream, make),       offsetof(Stream, lender), offsetof(Stream, lenders)};
#define OBJECTS (sizeof objects / sizeof *objects)

static PyObject **object_at(Stream *self, size_t index) { return (PyObject **)((char *)self + objects[index]); }

static int stream_traverse(Stream *self, visitproc visit, void *arg) {
    for (size_t i = 0; i < OBJECTS; i++) Py_VISIT(*object_at(self, i));
    return 0;
}

static int stream_clear(Stream *self) {
    self->sends = self->receives = 0;
    self->lends = self->borrows = NULL; /* their owners go */
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
    PyObject *wire, *lock, *armed, *raw, *hub, *array_type, *begin, *encode, *expected, *decode, *unknown, *make;
    int checks_all, allows_pickle, as_is;
    long long small_bytes, most_told;
    if (!PyArg_ParseTuple(args, "O!OO!OOOOOO!OOOpppLL", &WireType, &wire, &lock, &PySet_Type, &armed, &raw, &hub,
                          &array_type, &begin, &encode, &PyDict_Type, &expected, &decode, &unknown, &make, &checks_all,
                          &allows_pickle, &as_is, &small_bytes, &most_told))
        return NULL;
    Py_XSETREF(self->wire, (Wire *)Py_NewRef(wire));
    Py_XSETREF(self->lock, Py_NewRef(lock));
    Py_XSETREF(self->armed, Py_NewRef(armed));
    Py_XSETREF(self->raw, Py_NewRef(raw));
    Py_XSETREF(self->hub, Py_NewRef(hub));
    Py_XSETREF(self->array_type, Py_NewRef(array_type));
    Py_XSETREF(self->begin, Py_NewRef(begin));
    Py_XSETREF(self->encode, Py_NewRef(encode));
    Py_XSETREF(self->expected, Py_NewRef(expected));
    Py_XSETREF(self->decode, Py_NewRef(decode));
    Py_XSETREF(self->unknown, Py_NewRef(unknown));
    Py_XSETREF(self->make, Py_NewRef(make));
    self->checks_all = (char)checks_all;
    self->allows_pickle = (char)allows_pickle;
    self->as_is = (char)as_is;
    self->small_bytes = small_bytes;
    self->most_told = most_told;
    self->sends = self->receives = 1;
    Py_RETURN_NONE;
}

/* lend_from(lender, handle, loan): None: lend nothing */
static PyObject *stream_lend_from(Stream *self, PyObject *args) {
    PyObject *lender;
    unsigned long long handle, loan;
    if (!PyArg_ParseTuple(args, "OKK", &lender, &handle, &loan)) return NULL;
    self->lends = (shmr_loans *)(uintptr_t)handle;
    self->loan = (shmr_loan *)(uintptr_t)loan;
    Py_XSETREF(self->lender, Py_NewRef(lender));
    Py_RETURN_NONE;
}

/* borrow_from(lender, handle): None: nobody lends */
static PyObject *stream_borrow_from(Stream *self, PyObject *args) {
    PyObject *lender;
    unsigned long long handle;
    if (!PyArg_ParseTuple(args, "OK", &lender, &handle)) return NULL;
    self->borrows = (shmr_loans *)(uintptr_t)handle;
    Py_XSETREF(self->lenders, Py_NewRef(lender));
    Py_RETURN_NONE;
}

int is_ready(Stream *self) {
    if (!PyBytes_CheckExact(self->peer) || !self->wire->socket || PySet_GET_SIZE(self->armed)) return 0;
    PyObject *locked = PyObject_CallMethodNoArgs(self->lock, name_locked);
    PyObject *awake = locked ? PyObject_GetAttr(self->hub, name_awake) : NULL;
    if (!awake) PyErr_Clear();
    int ready = locked == Py_False && awake == Py_True;
    Py_XDECREF(locked);
    Py_XDECREF(awake);
    return ready;
}

int may_pump(Stream *self) { return is_ready(self) && !PyBytes_GET_SIZE(self->peer); }

long long item(PyObject *entry, Py_ssize_t index) { return PyLong_AsLongLong(PyTuple_GET_ITEM(entry, index)); }

PyObject *entry_of(PyObject *deque, Py_ssize_t index) {
    PyObject *entry = PyObject_Size(deque) > 0 ? PySequence_GetItem(deque, index) : NULL;
    Py_XDECREF(entry);
    return entry;
}

long long on_the_way(Stream *self) {
    PyObject *last = entry_of(self->kept, -1);
    return last ? item(last, 1) - self->released : 0;
}

long long next_number(Stream *self) {
    PyObject *last = entry_of(self->kept, -1);
    return last ? item(last, 0) + 1 : self->acknowledged;
}

static void drop_first(PyObject *deque) {
    PyObject *entry = PyObject_CallMethodNoArgs(deque, name_popleft);
    Py_XDECREF(entry);
}

/* Whether a part that was kept is just forgotten: `bytes`, or a message of ZeroMQ. Others are used again. */
static int is_plain(PyObject *part) { return PyBytes_CheckExact(part) || Py_IS_TYPE(part, &PartType); }

static void let_go_of_first(Stream *self, PyObject *entry) {
    self->acknowledged = item(entry, 0) + 1;
    self->released = item(entry, 1);
    self->messages = item(entry, 3);
    self->answers = 1;
    drop_first(self->kept);
}

/* Forget what is kept up to a number, or to the first part that is not plain: the caller's then. NULL: there is none. */
static PyObject *let_go(Stream *self, long long until) {
    PyObject *entry;
    while ((entry = entry_of(self->kept, 0)) && item(entry, 0) < until) {
        PyObject *part = PyTuple_GET_ITEM(entry, 2), *other = is_plain(part) ? NULL : Py_NewRef(part);
        let_go_of_first(self, entry);
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
    if (kind != ACKNOWLEDGE && ((kind != DATA && kind != LOAN) || prefix[1] != (uint64_t)self->received)) return 0;
    PyObject *what = Py_NewRef((PyObject *)part);
    long long cost = (long long)size + MESSAGE_COST;
    if (kind == LOAN) {
        if (!self->borrows || size != PREFIX_BYTES + sizeof(shmr_loan)) goto unusual;
        Borrowed *borrowed = borrowed_new(self->lenders, self->borrows, PREFIX_BYTES,
                                          (const char *)zmq.data(&part->message) + PREFIX_BYTES);
        if (!borrowed) goto unusual;
        Py_SETREF(what, (PyObject *)borrowed);
        cost = borrowed->nbytes + MESSAGE_COST;
    }
    if (kind != ACKNOWLEDGE && self->waiting + cost > self->look_at) goto unusual;
    PyObject *first = entry_of(self->kept, 0), *last = entry_of(self->kept, -1);
    if (first && prefix[2] > (uint64_t)item(first, 0)) {
        /* Somebody, or a part that was kept, may wait for the room; and what is not plain is used again. */
        if (self->handed_over != next_number(self) || !self->armed || PySet_GET_SIZE(self->armed)) goto unusual;
        if (!is_plain(PyTuple_GET_ITEM(first, 2)) || !is_plain(PyTuple_GET_ITEM(last, 2))) goto unusual;
        long long until = prefix[2] > INT64_MAX ? INT64_MAX : (long long)prefix[2];
        while ((first = entry_of(self->kept, 0)) && item(first, 0) < until) {
            /* Large ones between small ones: to let go of these may run Python, and let go of the GIL. */
            if (!is_plain(PyTuple_GET_ITEM(first, 2))) goto unusual;
            let_go_of_first(self, first);
        }
    }
    if (kind == ACKNOWLEDGE) {
        Py_DECREF(what);
        return 1;
    }
    PyTuple_SET_ITEM(entry, 0, PyLong_FromLongLong(self->received));
    PyTuple_SET_ITEM(entry, 1, PyLong_FromLong(DATA));
    PyTuple_SET_ITEM(entry, 2, what);
    if (PyErr_Occurred() || append(self->inbox, entry) < 0) return -1;
    self->received++;
    self->waiting += cost;
    return 1;
unusual:
    Py_DECREF(what);
    return PyErr_Occurred() ? -1 : 0;
}

/* ---- Receiving --------------------------------------------------------------------------------------------------- */

/* Whether the checksum of a frame is right, and `decode` may know it. */
static int is_sound(Stream *self, const unsigned char *frame, uint64_t nbytes, frame_header *header) {
    if (nbytes < HEADER_BYTES) return 0;
    memcpy(header, frame, HEADER_BYTES);
    return memcmp(header->magic, "SHMF", 4) == 0 && header->version == 1 && header->flags == 0 &&
           (header->kind == KIND_ARRAY || (header->kind == KIND_PICKLE && self->allows_pickle)) &&
           header->total == nbytes && header->checked <= nbytes - HEADER_BYTES && header->checked <= CHECKED_BYTES &&
           header->in_band <= header->checked && header->prefix <= header->checked - header->in_band &&
           zmq.crc32c(0, frame + CHECKED_FROM, HEADER_BYTES - CHECKED_FROM + header->checked) == header->crc;
}

/* Whether the short way may go on: nobody is on the long one. */
static int may_take(Stream *self) { return self->receives && is_ready(self) && !self->wire->half; }

/* Tell the other end what was taken, if that is due; if it cannot be told, the service will do so. */
static void acknowledge(Stream *self) {
    if (self->taken - self->told < self->most_told && self->taken_bytes - self->told_bytes < self->acknowledge_bytes) return;
    uint64_t prefix[3] = {ACKNOWLEDGE, 0, (uint64_t)self->taken};
    zmq_msg message;
    if (zmq.init_size(&message, PREFIX_BYTES) < 0) return;
    memcpy(zmq.data(&message), prefix, PREFIX_BYTES);
    if (to_peer(self, &message)) {
        self->told = self->taken;
        self->told_bytes = self->taken_bytes;
    }
    zmq.close(&message);
}

static PyObject *stream_take(Stream *self, PyObject *box) {
    if (!PyList_Check(box)) {
        PyErr_SetString(PyExc_TypeError, "take_small() needs a list");
        return NULL;
    }
    if (!may_take(self)) Py_RETURN_FALSE;
    if (PyObject_Size(self->inbox) == 0 && PyObject_Size(self->raw) == 0 && may_pump(self) &&
        wire_pump(self->wire, self->raw, BATCH, self) < 0)
        return NULL;
    PyObject *entry = entry_of(self->inbox, 0);
    if (!entry || item(entry, 0) != self->taken || item(entry, 1) != DATA) Py_RETURN_FALSE;
    PyObject *part = PyTuple_GET_ITEM(entry, 2);
    Borrowed *borrowed = Py_IS_TYPE(part, BorrowedType) ? (Borrowed *)part : NULL;
    if (!borrowed && !Py_IS_TYPE(part, &PartType)) Py_RETURN_FALSE;
    Py_ssize_t nbytes = borrowed ? borrowed->nbytes : (Py_ssize_t)zmq.size(&((Part *)part)->message);
    if (nbytes > (borrowed ? MOST_LENT_BYTES + MOST_BEGINNING_BYTES : SMALL_PART_BYTES)) Py_RETURN_FALSE;

    Py_INCREF(entry); /* from here to the next look Python runs: handlers of signals, other threads */
    const unsigned char *frame;
    PyObject *memory = part;
    if (!borrowed) {
        frame = (const unsigned char *)zmq.data(&((Part *)part)->message) + PREFIX_BYTES;
    } else {
        if (borrowed_copy(borrowed, self->make, 0) < 0) {
            Py_DECREF(entry);
            if (!PyErr_ExceptionMatches(PyExc_MemoryError) && !PyErr_ExceptionMatches(PyExc_ValueError)) return NULL;
            PyErr_Clear(); /* the long way has something to say about it */
            Py_RETURN_FALSE;
        }
        memory = borrowed->target;
        frame = borrowed->bytes;
    }
    frame_header header;
    PyObject *expected = PyDict_GetItem(self->expected, zero); /* borrowed */
    unsigned long long number = expected ? PyLong_AsUnsignedLongLong(expected) : 0;
    if (PyErr_Occurred()) { /* somebody has sent the last number that there is */
        PyErr_Clear();
        Py_DECREF(entry);
        Py_RETURN_FALSE;
    }
    /* What is decoded here should not be decoded once more on the long way: who knows what that does. */
    if (!is_sound(self, frame, (uint64_t)(nbytes - PREFIX_BYTES), &header) ||
        (header.kind == KIND_PICKLE && (header.parts || nbytes > SMALL_PART_BYTES)) ||
        header.number != number) {
        Py_DECREF(entry);
        Py_RETURN_FALSE;
    }
    int in_place = header.kind == KIND_ARRAY && (uintptr_t)frame % ALIGNMENT == 0 && (borrowed || nbytes >= IN_PLACE_BYTES);
    PyObject *obj = PyObject_CallFunction(
        self->decode, "y#iIIKKO", (const char *)frame,
        (Py_ssize_t)(in_place ? HEADER_BYTES + header.prefix : nbytes - PREFIX_BYTES), (int)header.kind, header.parts,
        header.prefix, (unsigned long long)header.in_band, (unsigned long long)header.total, in_place ? memory : Py_None);
    PyObject *following = obj ? PyLong_FromUnsignedLongLong(header.number + 1) : NULL;
    int done = following && obj != self->unknown && entry_of(self->inbox, 0) == entry && may_take(self);
    if (done && (PyList_Append(box, obj) < 0 || PyDict_SetItem(self->expected, zero, following) < 0)) done = 0;
    if (done) {
        if (borrowed) borrowed_give_back(borrowed);
        drop_first(self->inbox);
        self->taken++;
        self->taken_bytes += nbytes;
        self->quick_received++;
        self->quick_received_bytes += (unsigned long long)(nbytes - PREFIX_BYTES);
        acknowledge(self);
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
    COUNTER(lent_pace),
    {"offered", T_BOOL, offsetof(Stream, offered), 0, "memory was offered over this connection, or cannot be"},
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
     "use($self, wire, lock, armed, raw, hub, array_type, begin, encode, expected, decode, unknown, make, checks_all,\n"
     "    allows_pickle, as_is, small_bytes, most_told, /)\n--\n\nSay what `send_small` and `take_small` need, and let them be used."},
    {"send_small", (PyCFunction)(void (*)(void))stream_send_small, METH_FASTCALL,
     "send_small($self, obj, looked, /)\n--\n\nSend an object; False: it has to go the long way."},
    {"take_small", (PyCFunction)stream_take, METH_O,
     "take_small($self, box, /)\n--\n\nAppend the next message to a list, and have it taken; False: go the long way."},
    {"lend_from", (PyCFunction)stream_lend_from, METH_VARARGS,
     "lend_from($self, lender, handle, loan, /)\n--\n\nLend arrays, too; None, 0, 0: do so no more."},
    {"borrow_from", (PyCFunction)stream_borrow_from, METH_VARARGS,
     "borrow_from($self, lender, handle, /)\n--\n\nTake what is lent, too; None, 0: do so no more."},
    {"let_go", (PyCFunction)stream_let_go, METH_O,
     "let_go($self, until, /)\n--\n\nForget what is kept up to a number, or to the first part that can be used again, and\n"
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
