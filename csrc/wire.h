/* SPDX-License-Identifier: BSD-3-Clause */
/* What the two sources of small messages over sockets share: wire.c and small.c.
 *
 * Whoever uses a socket holds its port's lock, or the GIL from a look at that lock to the end: all here keep the GIL,
 * and nothing waits. So neither another thread nor a signal's handler sees a step half done.
 *
 * New objects that the garbage collector knows are made before anything is looked at, or while it is off: it may run any
 * code then.
 */
#ifndef WIRE_H
#define WIRE_H

#include "handles.h"

#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#include <numpy/ndarraytypes.h>

#define DONTWAIT 1 /* of zmq.h, which nobody needs to have installed */
#define SNDMORE 2
#define SRCFD 2
#define MOST_DIMENSIONS 4

typedef union {
    unsigned char bytes[64];
    void *aligned;
} zmq_msg;

struct zmq {
    uint32_t (*crc32c)(uint32_t, const void *, uint64_t); /* the core's */
    int (*init)(zmq_msg *), (*close)(zmq_msg *), (*more)(const zmq_msg *), (*get)(const zmq_msg *, int);
    size_t (*size)(const zmq_msg *);
    void *(*data)(zmq_msg *);
    int (*recv)(zmq_msg *, void *, int);
    int (*send)(void *, const void *, size_t, int);
};
extern struct zmq zmq;

typedef struct {
    PyObject_HEAD
    zmq_msg message;
} Part;

typedef struct {
    PyObject_HEAD
    void *socket;
    char half; /* of a message perhaps only the address was sent */
} Wire;

/* The frame of the last object that was sent, but for its own bytes: of many alike. */
typedef struct {
    PyObject *frame;
    PyObject *kind; /* the dtype of an array, or `bytes` */
    Py_ssize_t at, nbytes;
    int dimensions;
    npy_intp shape[MOST_DIMENSIONS];
} Template;

typedef struct {
    PyObject_HEAD
    PyObject *kept;  /* deque of (number, position of its end, part, messages up to it): may have to be sent again */
    PyObject *inbox; /* deque of (number, kind, part): has come, was not taken */
    PyObject *peer;
    long long acknowledged, messages, released, handed_over, handed_over_most; /* sending */
    long long received, taken, taken_bytes, told, told_bytes;                  /* receiving */
    long long waiting, look_at; /* bytes in the inbox, as sessions.py counts them; from where on it looks itself */
    /* of the two short ways */
    char sends, receives; /* may be gone: nobody is on the long one */
    char answers;
    char checks_all, allows_pickle;
    long long pace, most_told, acknowledge_bytes; /* bytes that may be on their way; what is taken before that is told */
    unsigned long long quick_sent, quick_sent_bytes, quick_received, quick_received_bytes;
    Wire *wire;
    PyObject *lock, *armed, *raw, *hub; /* of the port */
    Template last;
    PyObject *array_type, *encode; /* `encode` returns None for what is not small */
    PyObject *expected, *decode, *unknown; /* of the link; `decode` returns `unknown` for what it does not know */
} Stream;

extern PyTypeObject PartType, WireType, StreamType;

/* Take up to `most` parts (-1: all) out of the socket: to the stream, if they suit it, else to `raw`, a deque, and with
 * them all that follow. Returns 1: there may be more, 0: there was nothing more, -1: an exception. */
int wire_pump(Wire *self, PyObject *raw, long long most, Stream *stream);

/* Whether all that a part calls for is done: it is an acknowledgement, or the next small message, now in the inbox.
 * `entry` is a new tuple of three. -1: an exception. */
int stream_feed(Stream *self, Part *part, PyObject *entry);

int append(PyObject *deque, PyObject *entry);
int add_stream(PyObject *module);

#endif
