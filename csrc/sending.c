/* SPDX-License-Identifier: BSD-3-Clause */
/* Objects sent in one call: their frames are made of what the last one's began with, and are lent, or travel. */
#include "wire.h"

#include <string.h>
#include <time.h>

#define LENT_BYTES 4096 /* from here on an array is lent, where that is possible */
#define MOST_AT_ONCE 16384
#define LOOK_EVERY 64
#define LOOK_NS 50000000

/* The bytes of an object that is as the last one was, which alone differ in their frames; NULL: it is not. */
static const void *bytes_of(Stream *self, PyObject *obj) {
    Template *last = &self->last;
    if (!last->beginning) return NULL;
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

/* When all else is set: who lets go of a dtype may run Python. */
static void set_last(Stream *self, PyObject *beginning, PyObject *kind, Py_ssize_t nbytes) {
    self->last.nbytes = nbytes;
    Py_XSETREF(self->last.beginning, beginning);
    Py_XSETREF(self->last.kind, Py_NewRef(kind));
}

/* Remember what the frame of `bytes` begins and ends with, if these are where they are expected in it. */
static void remember_bytes(Stream *self, PyObject *obj, PyObject *frame) {
    Py_ssize_t nbytes = PyBytes_GET_SIZE(obj), at = PyBytes_GET_SIZE(frame) - AFTER_BYTES - nbytes;
    const char *raw = PyBytes_AS_STRING(frame);
    if (nbytes <= 0 || at < HEADER_BYTES || memcmp(raw + at, PyBytes_AS_STRING(obj), (size_t)nbytes) != 0) return;
    PyObject *beginning = PyBytes_FromStringAndSize(raw, at);
    if (!beginning) return;
    memcpy(self->last.after, raw + at + nbytes, AFTER_BYTES);
    set_last(self, beginning, (PyObject *)&PyBytes_Type, nbytes);
}

/* Remember what the frame of an array begins with; 0: it is not small, and is not lent. -1: an exception. */
static int remember_array(Stream *self, PyObject *obj) {
    PyArrayObject *array = (PyArrayObject *)obj;
    int dimensions = PyArray_NDIM(array);
    npy_intp shape[MOST_DIMENSIONS];
    if (dimensions > MOST_DIMENSIONS || !(PyArray_FLAGS(array) & NPY_ARRAY_C_CONTIGUOUS)) return 0;
    for (int i = 0; i < dimensions; i++) shape[i] = PyArray_DIM(array, i);
    PyObject *size = PyObject_GetAttrString(obj, "nbytes");
    long long nbytes = size ? PyLong_AsLongLong(size) : -1;
    Py_XDECREF(size);
    if (nbytes < 0) return -1;
    if (!nbytes || nbytes > (self->lends && self->as_is ? MOST_LENT_BYTES : self->small_bytes)) return 0;
    PyObject *kind = Py_NewRef((PyObject *)PyArray_DESCR(array));
    PyObject *beginning = PyObject_CallOneArg(self->begin, obj); /* Python: the array may be another one after it */
    int known = beginning ? 0 : -1;
    frame_header header;
    if (beginning && PyBytes_CheckExact(beginning) && PyBytes_GET_SIZE(beginning) >= HEADER_BYTES &&
        PyBytes_GET_SIZE(beginning) <= MOST_BEGINNING_BYTES) {
        memcpy(&header, PyBytes_AS_STRING(beginning), HEADER_BYTES);
        known = header.total == (uint64_t)(PyBytes_GET_SIZE(beginning) + nbytes) && PyArray_NDIM(array) == dimensions &&
                (PyObject *)PyArray_DESCR(array) == kind;
        for (int i = 0; known && i < dimensions; i++) known = PyArray_DIM(array, i) == shape[i];
    }
    if (known > 0) {
        self->last.dimensions = dimensions;
        memcpy(self->last.shape, shape, sizeof shape);
        set_last(self, Py_NewRef(beginning), kind, (Py_ssize_t)nbytes);
    }
    Py_XDECREF(beginning);
    Py_DECREF(kind);
    return known;
}

static Py_ssize_t after_last(const Stream *self) {
    return self->last.kind == (PyObject *)&PyBytes_Type ? AFTER_BYTES : 0;
}

/* Fill in the number and the checksum of a frame: of its beginning, and of the rest, which follows that somewhere else. */
static void seal(unsigned char *beginning, size_t nbytes, const void *rest, size_t rest_bytes, uint64_t number, int checks_all) {
    frame_header header;
    memcpy(&header, beginning, HEADER_BYTES);
    header.number = number;
    if (checks_all) header.checked = nbytes + rest_bytes - HEADER_BYTES;
    memcpy(beginning, &header, HEADER_BYTES);
    uint64_t checked = HEADER_BYTES + header.checked, here = checked < nbytes ? checked : nbytes;
    header.crc = zmq.crc32c(0, beginning + CHECKED_FROM, here - CHECKED_FROM);
    if (checked > here) header.crc = zmq.crc32c(header.crc, rest, checked - here);
    memcpy(beginning, &header, CHECKED_FROM);
}

/* A part with an object's frame, not sealed: as the last one's but for these bytes, or a frame of `encode`. */
static Part *part_of(Stream *self, const void *data, PyObject *frame) {
    Template *last = &self->last;
    const char *source = PyBytes_AS_STRING(frame);
    size_t nbytes = (size_t)PyBytes_GET_SIZE(frame), after = data ? (size_t)after_last(self) : 0;
    Part *part = part_new(PREFIX_BYTES + nbytes + (data ? (size_t)last->nbytes + after : 0));
    if (!part) return NULL;
    char *target = (char *)zmq.data(&part->message) + PREFIX_BYTES;
    memcpy(target, source, nbytes);
    if (data) {
        memcpy(target + nbytes, data, (size_t)last->nbytes);
        memcpy(target + nbytes + last->nbytes, last->after, after);
    }
    return part;
}

/* A part that says where the frame of an array lies that is lent; NULL, without an exception: it has to travel. */
static Part *lent_part(Stream *self, const void *data, uint64_t number) {
    Template *last = &self->last;
    unsigned char beginning[MOST_BEGINNING_BYTES];
    size_t nbytes = (size_t)PyBytes_GET_SIZE(last->beginning);
    Part *part = part_new(PREFIX_BYTES + sizeof(shmr_loan));
    if (!part) return NULL;
    memcpy(beginning, PyBytes_AS_STRING(last->beginning), nbytes);
    seal(beginning, nbytes, data, (size_t)last->nbytes, number, self->checks_all);
    const shmr_piece pieces[] = {{beginning, nbytes}, {data, (uint64_t)last->nbytes}};
    shmr_loan loan;
    if (!loans.lend(self->lends, pieces, 2, &loan)) {
        Py_DECREF(part);
        return NULL;
    }
    memcpy((char *)zmq.data(&part->message) + PREFIX_BYTES, &loan, sizeof loan);
    return part;
}

/* What nobody has kept. */
static void take_back(Stream *self, Part *part) {
    shmr_loan loan;
    memcpy(&loan, (char *)zmq.data(&part->message) + PREFIX_BYTES, sizeof loan);
    loans.give_back(self->lends, &loan);
}

int to_peer(Stream *self, zmq_msg *part) {
    void *socket = self->wire->socket;
    zmq_msg message;
    zmq.init(&message);
    if (zmq.copy(&message, part) < 0) return 0;
    Py_ssize_t name = PyBytes_GET_SIZE(self->peer);
    int named = !name || zmq.send(socket, PyBytes_AS_STRING(self->peer), (size_t)name, DONTWAIT | SNDMORE) >= 0;
    int sent = named && zmq.send_msg(&message, socket, DONTWAIT) >= 0;
    if (sent) return 1;
    zmq.close(&message);
    if (name && named) self->wire->half = 1;
    return 0;
}

PyObject *stream_send_small(Stream *self, PyObject *const *args, Py_ssize_t count) {
    if (count != 2) {
        PyErr_SetString(PyExc_TypeError, "send_small() takes an object and a time");
        return NULL;
    }
    PyObject *obj = args[0];
    long long looked = PyLong_AsLongLong(args[1]);
    if (looked == -1 && PyErr_Occurred()) return NULL;
    if (!self->sends) Py_RETURN_FALSE;
    Part *part = NULL;
    PyObject *frame = NULL, *entry = PyTuple_New(4);
    if (!entry) return NULL;

    /* Whatever runs Python: what comes after it looks again. */
    const void *data = bytes_of(self, obj);
    if (!data && (PyObject *)Py_TYPE(obj) == self->array_type) {
        int known = remember_array(self, obj);
        if (known < 0) goto failed;
        if (known) data = bytes_of(self, obj);
    }
    if (!data) {
        frame = PyObject_CallOneArg(self->encode, obj);
        if (!frame) goto failed;
        if (!PyBytes_CheckExact(frame) || PyBytes_GET_SIZE(frame) < HEADER_BYTES) goto unusual;
        if (PyBytes_CheckExact(obj)) remember_bytes(self, obj, frame);
        if (PyErr_Occurred()) goto failed;
    }

    long long nbytes = PyBytes_GET_SIZE(data ? self->last.beginning : frame);
    if (data) nbytes += self->last.nbytes + after_last(self);
    int lent = data && !after_last(self) && self->last.nbytes >= LENT_BYTES && self->as_is;
    /* There memory is offered, and what was lent and perhaps not kept, since a handler of a signal has raised, taken back. */
    if (lent && (self->lends ? self->loan->length != 0 : !self->offered)) goto unusual;
    lent = lent && self->lends && !(self->checks_all && nbytes > CHECKED_BYTES);
    if (!lent && nbytes > SMALL_PART_BYTES - PREFIX_BYTES) goto unusual;
    long long number = next_number(self), cost = PREFIX_BYTES + nbytes + MESSAGE_COST;
    long long room = (lent ? self->lent_pace : self->pace) - cost;
    if (number % LOOK_EVERY == 0 || on_the_way(self) > room) { /* look what was acknowledged */
        if (!may_pump(self)) goto unusual;
        if (wire_pump(self->wire, self->raw, MOST_AT_ONCE, self) < 0) goto failed;
    }
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    if (!self->sends || self->handed_over != number || on_the_way(self) > room ||
        now.tv_sec * 1000000000LL + now.tv_nsec - looked > LOOK_NS || !is_ready(self) || self->wire->half)
        goto unusual;
    PyObject *last = entry_of(self->kept, -1);
    long long end = (last ? item(last, 1) : self->released) + cost;
    long long messages = last ? item(last, 3) : self->messages;

    PyTuple_SET_ITEM(entry, 0, PyLong_FromLongLong(number));
    PyTuple_SET_ITEM(entry, 1, PyLong_FromLongLong(end));
    PyTuple_SET_ITEM(entry, 3, PyLong_FromLongLong(messages + 1));
    if (PyErr_Occurred()) goto failed;
    if (lent) part = lent_part(self, data, (uint64_t)messages);
    int kind = part ? LOAN : DATA;
    if (!part) {
        if (PyErr_Occurred()) goto failed;
        if (nbytes > SMALL_PART_BYTES - PREFIX_BYTES || end - self->released > self->pace) goto unusual;
        part = part_of(self, data, data ? self->last.beginning : frame);
        if (!part) goto failed;
        seal((unsigned char *)zmq.data(&part->message) + PREFIX_BYTES, (size_t)nbytes, NULL, 0, (uint64_t)messages,
             self->checks_all);
    }
    PyTuple_SET_ITEM(entry, 2, (PyObject *)part);
    uint64_t prefix[3] = {(uint64_t)kind, (uint64_t)number, (uint64_t)self->taken};
    memcpy(zmq.data(&part->message), prefix, PREFIX_BYTES);
    if (append(self->kept, entry) < 0) {
        if (kind == LOAN) take_back(self, part);
        goto failed;
    }
    self->quick_sent++;
    self->quick_sent_bytes += (unsigned long long)nbytes;
    /* From here on it is sent. If the connection has just ended the service will give it to the next one. */
    if (to_peer(self, &part->message)) {
        self->handed_over = self->handed_over_most = number + 1;
        self->told = self->taken;
        self->told_bytes = self->taken_bytes;
    }
    Py_XDECREF(frame);
    Py_DECREF(entry);
    Py_RETURN_TRUE;
unusual:
    Py_XDECREF(frame);
    Py_DECREF(entry);
    Py_RETURN_FALSE;
failed:
    Py_XDECREF(frame);
    Py_DECREF(entry);
    return NULL;
}
