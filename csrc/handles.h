/* SPDX-License-Identifier: BSD-3-Clause */
/* What the sources of shmengine._native._handles share. */
#ifndef HANDLES_H
#define HANDLES_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stddef.h>
#include <stdint.h>
#include <structmember.h>

#include "shmr.h"

#ifndef Py_T_OBJECT_EX
#define Py_T_OBJECT_EX T_OBJECT_EX
#define Py_READONLY READONLY
#define Py_T_ULONGLONG T_ULONGLONG
#define Py_T_INT T_INT
#endif

/* The core is in cffi's module; its addresses are handed over once. */
struct handles_core {
    int (*claim)(shmr *, uint64_t, const shmr_ref *, uint32_t, int, int64_t, shmr_block *);
    void (*announce)(shmr *, uint32_t);
    int (*commit)(shmr *, uint32_t, int, int, int64_t, shmr_block *);
    int (*abort)(shmr *, shmr_block *);
    int (*lease)(shmr *, uint32_t, int, int64_t, shmr_block *);
    int (*release)(shmr *, shmr_block *);
    int (*send)(shmr *, uint32_t, int, int64_t, const void *, shmr_block *);
    int (*check_payload)(shmr *, const shmr_block *);
};
extern struct handles_core core;

#define SLEEP_NS 50000000 /* then Python looks for signals, and what has become of the others */

int64_t monotonic_ns(void);               /* handles.c */
int64_t sleep_end(int64_t deadline);      /* the deadline of a sleep that Python does not see the end of */

/* message.c */
typedef struct {
    PyObject_HEAD
    PyObject *region; /* has the handle, and the mapping */
    shmr *handle;
    char *base;
    shmr_block block;
} Message;
extern PyTypeObject MessageType;
Message *message_like(const Message *other); /* of the same region; nothing is leased */

/* directions.c */
extern PyTypeObject InboxType, OutboxType;
int directions_init(void);

PyObject *connect_zeromq(PyObject *module, PyObject *args); /* wire.c */
PyObject *connect_loans(PyObject *module, PyObject *args);  /* borrowed.c */
int add_wire(PyObject *module);

PyObject *guard_stacks(PyObject *module, PyObject *args); /* stack.c */
PyObject *tell_stack(PyObject *module, PyObject *args);

#endif
