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
#endif

/* The core is in cffi's module; its addresses are handed over once. */
struct handles_core {
    int (*claim)(shmr *, uint64_t, const shmr_ref *, uint32_t, int, int64_t, shmr_block *);
    int (*commit)(shmr *, uint32_t, int, int, int64_t, shmr_block *);
    int (*abort)(shmr *, shmr_block *);
    int (*lease)(shmr *, uint32_t, int, int64_t, shmr_block *);
    int (*release)(shmr *, shmr_block *);
};
extern struct handles_core core;

extern PyTypeObject MessageType; /* message.c */

PyObject *connect_zeromq(PyObject *module, PyObject *args); /* wire.c */
int add_wire(PyObject *module);

#endif
