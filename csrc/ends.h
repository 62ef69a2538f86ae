/* SPDX-License-Identifier: BSD-3-Clause */
/* One process's end of a ring, and what it hands out: what handles.c, claims.c and leases.c share. */
#ifndef ENDS_H
#define ENDS_H

#include "handles.h"

#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#include <numpy/ndarraytypes.h>

#define PLACES 256 /* of the direct-mapped tables below */
#define SPARE_MAX 16

extern PyObject *lease_error; /* shmengine.errors.LeaseError */

struct claim;

typedef struct {
    PyObject_HEAD
    PyObject *dtype, *shape, *spec;
    uint64_t prefix, nbytes;
    struct {
        uint64_t offset;
        PyObject *array;
    } targets[PLACES];
    struct claim *spare;
    int spare_count;
} Layout;

typedef struct {
    PyObject_HEAD
    PyObject *ring; /* weak */
    PyObject *region;
    PyObject *kept;    /* messages that nobody got, because a signal's handler raised: they come first */
    PyObject *layouts; /* (shape, dtype) -> Layout */
    PyObject *last_shape, *last_dtype, *last_layout; /* who sends one kind of array often sends the same objects */
    shmr *handle;
    int payload_check;
    unsigned long long leases, bytes_leased; /* so far */
    struct {
        uint64_t offset, length;
        uint32_t spec_bytes;
        unsigned char spec[128];
        PyObject *root, *array;
    } views[PLACES];
    struct lease *spare;
    int spare_count;
} End;

typedef struct claim {
    PyObject_HEAD
    PyObject *ring; /* strong while in use */
    End *end;
    Layout *layout;
    PyObject *array, *timeout;
    struct claim *next;
    shmr_block block;
} Claim;

typedef struct lease {
    PyObject_HEAD
    PyObject *ring;
    End *end;
    PyObject *array;
    struct lease *next;
    int asked, entered;
    shmr_block block;
} Lease;

extern PyTypeObject ClaimType, LayoutType; /* claims.c */
extern PyTypeObject LeaseType;             /* leases.c */

static inline uint32_t place_of(uint64_t offset) {
    return (uint32_t)((offset >> 6) * UINT64_C(0x9e3779b97f4a7c15) >> 56) % PLACES;
}

static inline PyObject *address(shmr_block *block) { return PyLong_FromVoidPtr(block); }

/* Whoever may wait spins a little first: a partner on another core answers within a microsecond. */
static inline int64_t brief(PyObject *timeout) {
    return timeout != Py_None && PyFloat_AsDouble(timeout) == 0 ? 0 : SHMR_BRIEFLY;
}

static inline int ended(const char *what, const char *how) {
    PyErr_Format(lease_error, "this %s has ended: it was %s", what, how);
    return -1;
}

static inline void set_writable(PyObject *array, int writable) {
    if (writable)
        PyArray_ENABLEFLAGS((PyArrayObject *)array, NPY_ARRAY_WRITEABLE);
    else
        PyArray_CLEARFLAGS((PyArrayObject *)array, NPY_ARRAY_WRITEABLE);
}

#define MEMBER(type, name) {#name, Py_T_OBJECT_EX, offsetof(type, name), Py_READONLY, NULL}

#endif
