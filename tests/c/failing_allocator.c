/* SPDX-License-Identifier: BSD-3-Clause */
/* Python's allocators, of which one call fails: built and loaded by tests/unit/test_handles.py. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

static PyMemAllocatorEx objects, memory;
static long long left; /* until one fails; 0: none does */

static int fails(void) { return left > 0 && --left == 0; }

static void *take(void *context, size_t bytes) {
    PyMemAllocatorEx *a = context;
    return fails() ? NULL : a->malloc(a->ctx, bytes);
}
static void *take_zeroed(void *context, size_t count, size_t bytes) {
    PyMemAllocatorEx *a = context;
    return fails() ? NULL : a->calloc(a->ctx, count, bytes);
}
static void *resize(void *context, void *old, size_t bytes) {
    PyMemAllocatorEx *a = context;
    return fails() ? NULL : a->realloc(a->ctx, old, bytes);
}
static void give(void *context, void *old) {
    PyMemAllocatorEx *a = context;
    a->free(a->ctx, old);
}

static void put(PyMemAllocatorDomain domain, PyMemAllocatorEx *real) {
    PyMem_GetAllocator(domain, real);
    PyMemAllocatorEx ours = {real, take, take_zeroed, resize, give};
    PyMem_SetAllocator(domain, &ours);
}

void install(void) {
    put(PYMEM_DOMAIN_OBJ, &objects);
    put(PYMEM_DOMAIN_MEM, &memory);
}
void uninstall(void) {
    PyMem_SetAllocator(PYMEM_DOMAIN_OBJ, &objects);
    PyMem_SetAllocator(PYMEM_DOMAIN_MEM, &memory);
}
void arm(long long nth) { left = nth; }
long long disarm(void) {
    long long rest = left;
    left = 0;
    return rest;
}
