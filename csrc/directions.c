/* SPDX-License-Identifier: BSD-3-Clause */
/* The short way through the two directions of a channel over shared memory: one call a message.
 *
 *   Outbox.put    bytes, and arrays of a layout that was sent before: claim, copy, commit
 *   Inbox.take    the same kinds: lease, make the object; it is the next one again until it was `taken`
 *
 * Both take the turn (shmengine/channels/turns.py) if nobody has it, and never run Python code: no signal's handler comes
 * in between. Whatever is another kind, has to wait (but for a moment), was begun by a call that was interrupted, or
 * fails, is left to Python (shmengine/channels/directions.py), as it was found.
 */
#include "handles.h"

#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#include <numpy/arrayobject.h>

#define KIND_ARRAY 1
#define KIND_BYTES 3
#define SMALL_BYTES (64 << 10) /* copied, and checked, with the GIL held; of that size bytes have a checksum */
#define KNOWN 8                /* layouts */
#define DIMENSIONS 8

/* ---- layouts of arrays ---------------------------------------------------------------------------------------- */

struct layout {
    PyArray_Descr *dtype; /* NULL: none */
    int ndim;
    npy_intp shape[DIMENSIONS];
    npy_intp nbytes;
    uint32_t spec_bytes;
    unsigned char spec[128];
};

struct layouts {
    struct layout known[KNOWN];
    unsigned turn; /* which one goes next */
};

static const struct layout *layout_of_array(const struct layouts *all, PyArrayObject *array) {
    for (int i = 0; i < KNOWN; i++) {
        const struct layout *l = &all->known[i];
        if (l->dtype == PyArray_DESCR(array) && l->ndim == PyArray_NDIM(array) &&
            memcmp(l->shape, PyArray_DIMS(array), (size_t)l->ndim * sizeof *l->shape) == 0)
            return l;
    }
    return NULL;
}

static const struct layout *layout_of_spec(const struct layouts *all, const shmr_block *block) {
    for (int i = 0; i < KNOWN; i++) {
        const struct layout *l = &all->known[i];
        if (l->dtype && l->spec_bytes == block->spec_bytes && (uint64_t)l->nbytes == block->length &&
            memcmp(l->spec, block->spec, block->spec_bytes) == 0)
            return l;
    }
    return NULL;
}

static void remember(struct layouts *all, PyArrayObject *array, const shmr_block *block) {
    if (PyArray_NDIM(array) > DIMENSIONS) return;
    struct layout *l = &all->known[all->turn++ % KNOWN];
    Py_XSETREF(l->dtype, (PyArray_Descr *)Py_NewRef((PyObject *)PyArray_DESCR(array)));
    l->ndim = PyArray_NDIM(array);
    memcpy(l->shape, PyArray_DIMS(array), (size_t)l->ndim * sizeof *l->shape);
    l->nbytes = PyArray_NBYTES(array);
    l->spec_bytes = block->spec_bytes;
    memcpy(l->spec, block->spec, block->spec_bytes);
}

static void forget(struct layouts *all) {
    for (int i = 0; i < KNOWN; i++) Py_CLEAR(all->known[i].dtype);
}

/* ---- turns ------------------------------------------------------------------------------------------------------ */

/* A Turn, and the methods of its lock. */
struct turn {
    int open; /* the end is used, and not closed */
    PyObject *turn, *is_owned, *acquire, *release;
};

static PyObject *coroutine_thread; /* the attribute's name */

static void turn_forget(struct turn *t) {
    Py_CLEAR(t->turn);
    Py_CLEAR(t->is_owned);
    Py_CLEAR(t->acquire);
    Py_CLEAR(t->release);
}

static int turn_set(struct turn *t, PyObject *turn) {
    turn_forget(t); /* once more, after a start that was interrupted */
    PyObject *lock = PyObject_GetAttrString(turn, "_lock");
    if (!lock) return -1;
    t->is_owned = PyObject_GetAttrString(lock, "_is_owned");
    t->acquire = PyObject_GetAttrString(lock, "acquire");
    t->release = PyObject_GetAttrString(lock, "release");
    Py_DECREF(lock);
    if (!t->is_owned || !t->acquire || !t->release) return -1;
    t->turn = Py_NewRef(turn);
    t->open = 1;
    return 0;
}

static int answer(PyObject *object) {
    if (!object) PyErr_Clear();
    int is_true = object == Py_True;
    Py_XDECREF(object);
    return is_true;
}

static void turn_leave(const struct turn *t) { answer(PyObject_CallNoArgs(t->release)); }

/* False: somebody has it: another thread, a coroutine, or a call of this thread that a handler has interrupted. */
static int turn_take(const struct turn *t) {
    if (!t->open || answer(PyObject_CallNoArgs(t->is_owned)) || !answer(PyObject_CallOneArg(t->acquire, Py_False)))
        return 0;
    PyObject *thread = PyObject_GetAttr(t->turn, coroutine_thread);
    int free = thread && PyObject_Not(thread) == 1;
    if (!thread) PyErr_Clear();
    Py_XDECREF(thread);
    if (!free) turn_leave(t);
    return free;
}

/* ---- Outbox ------------------------------------------------------------------------------------------------------ */

typedef struct {
    PyObject_HEAD
    PyObject *region;
    shmr *handle;
    int payload_check;
    struct turn turn;
    struct layouts layouts;
    shmr_block block; /* what is claimed, and not committed */
} Outbox;

static PyObject *outbox_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"region", "handle", "payload_check", NULL};
    PyObject *region;
    unsigned long long handle;
    int payload_check;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OKp", names, &region, &handle, &payload_check)) return NULL;
    Outbox *self = (Outbox *)type->tp_alloc(type, 0);
    if (!self) return NULL;
    self->region = Py_NewRef(region);
    self->handle = (shmr *)(uintptr_t)handle;
    self->payload_check = payload_check;
    return (PyObject *)self;
}

static void outbox_dealloc(Outbox *self) {
    turn_forget(&self->turn);
    forget(&self->layouts);
    Py_XDECREF(self->region);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyObject *outbox_open(Outbox *self, PyObject *turn) {
    if (turn_set(&self->turn, turn) < 0) return NULL;
    Py_RETURN_NONE;
}

static PyObject *outbox_shut(Outbox *self, PyObject *unused) {
    (void)unused;
    self->turn.open = 0;
    Py_RETURN_NONE;
}

/* Describe the message in the block; its bytes, or NULL: not one of ours. */
static const void *describe(Outbox *self, PyObject *obj, int *check) {
    shmr_block *block = &self->block;
    if (PyBytes_CheckExact(obj)) {
        block->kind = KIND_BYTES;
        block->length = (uint64_t)PyBytes_GET_SIZE(obj);
        block->spec_bytes = 0;
        *check = 1;
        return block->length <= SMALL_BYTES ? PyBytes_AS_STRING(obj) : NULL;
    }
    if (!PyArray_CheckExact(obj)) return NULL;
    PyArrayObject *array = (PyArrayObject *)obj;
    const struct layout *l = layout_of_array(&self->layouts, array);
    if (!l || l->nbytes > SMALL_BYTES || !PyArray_IS_C_CONTIGUOUS(array)) return NULL;
    block->kind = KIND_ARRAY;
    block->length = (uint64_t)l->nbytes;
    block->spec_bytes = l->spec_bytes;
    memcpy(block->spec, l->spec, l->spec_bytes);
    *check = self->payload_check;
    return PyArray_DATA(array);
}

/* put(obj, deadline): True: it was sent */
static PyObject *outbox_put(Outbox *self, PyObject *const *args, Py_ssize_t count) {
    if (count != 2) {
        PyErr_SetString(PyExc_TypeError, "put(obj, deadline)");
        return NULL;
    }
    int64_t deadline = PyLong_AsLongLong(args[1]) == 0 ? 0 : SHMR_BRIEFLY;
    if (PyErr_Occurred()) return NULL;
    if (!turn_take(&self->turn)) Py_RETURN_FALSE;
    int status = SHMR_WOULD_BLOCK, check;
    if (!self->block.state) {
        const void *bytes = describe(self, args[0], &check);
        if (bytes) status = core.send(self->handle, 0, check, deadline, bytes, &self->block);
        if (status != SHMR_OK && self->block.state) core.abort(self->handle, &self->block);
    }
    turn_leave(&self->turn);
    return PyBool_FromLong(status == SHMR_OK);
}

/* What Python has just sent: the next such array need not go there. */
static PyObject *outbox_remember(Outbox *self, PyObject *array) {
    if (!PyArray_CheckExact(array)) {
        PyErr_SetString(PyExc_TypeError, "remember(array)");
        return NULL;
    }
    if (!layout_of_array(&self->layouts, (PyArrayObject *)array))
        remember(&self->layouts, (PyArrayObject *)array, &self->block);
    Py_RETURN_NONE;
}

static PyObject *outbox_address(Outbox *self, void *unused) {
    (void)unused;
    return PyLong_FromVoidPtr(&self->block);
}

static PyMethodDef outbox_methods[] = {
    {"open", (PyCFunction)outbox_open, METH_O, "From now on messages may go by `put`, one turn at a time."},
    {"shut", (PyCFunction)outbox_shut, METH_NOARGS, "From now on none may."},
    {"put", (PyCFunction)(void (*)(void))outbox_put, METH_FASTCALL,
     "Send a message if that needs no wait, and tell whether it was sent."},
    {"remember", (PyCFunction)outbox_remember, METH_O, "An array's layout: the block says how it is described."},
    {NULL, NULL, 0, NULL}};
static PyGetSetDef outbox_getset[] = {
    {"address", (getter)outbox_address, NULL, "Of the `shmr_block` that says what is claimed.", NULL},
    {NULL, NULL, NULL, NULL, NULL}};
PyTypeObject OutboxType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "shmengine._native._handles.Outbox",
    .tp_basicsize = sizeof(Outbox),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_doc = "The sending direction of a channel.",
    .tp_new = outbox_new,
    .tp_dealloc = (destructor)outbox_dealloc,
    .tp_methods = outbox_methods,
    .tp_getset = outbox_getset,
};

/* ---- Inbox ------------------------------------------------------------------------------------------------------- */

typedef struct {
    PyObject_HEAD
    PyObject *nothing; /* what says that there is no message */
    PyObject *kept;    /* leases that nobody got, because a signal's handler raised: they come first */
    PyObject *ready;   /* objects that nobody got, likewise */
    struct turn turn;
    struct layouts layouts;
    Message *message;  /* what is leased, and not settled */
    PyObject *current; /* the object of it; NULL: not made yet */
    int failed;        /* the status of a message that is gone, for Python to raise */
    unsigned long long received, bytes_received; /* settled so far */
} Inbox;

static PyObject *inbox_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"message", "kept", "nothing", NULL};
    PyObject *message, *kept, *nothing;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!OO", names, &MessageType, &message, &kept, &nothing)) return NULL;
    Inbox *self = (Inbox *)type->tp_alloc(type, 0);
    if (!self) return NULL;
    self->message = (Message *)Py_NewRef(message);
    self->kept = Py_NewRef(kept);
    self->nothing = Py_NewRef(nothing);
    return (PyObject *)self;
}

static void inbox_dealloc(Inbox *self) {
    turn_forget(&self->turn);
    forget(&self->layouts);
    Py_XDECREF(self->ready);
    Py_XDECREF(self->current);
    Py_XDECREF((PyObject *)self->message);
    Py_XDECREF(self->kept);
    Py_XDECREF(self->nothing);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyObject *inbox_open(Inbox *self, PyObject *const *args, Py_ssize_t count) {
    if (count != 2) {
        PyErr_SetString(PyExc_TypeError, "open(turn, ready)");
        return NULL;
    }
    Py_XSETREF(self->ready, Py_NewRef(args[1]));
    if (turn_set(&self->turn, args[0]) < 0) return NULL;
    Py_RETURN_NONE;
}

static PyObject *inbox_shut(Inbox *self, PyObject *unused) {
    (void)unused;
    self->turn.open = 0;
    Py_RETURN_NONE;
}

static void make_object(Inbox *self) {
    Message *message = self->message;
    const shmr_block *block = &message->block;
    char *data = message->base + block->offset;
    if (block->kind == KIND_BYTES) {
        self->current = PyBytes_FromStringAndSize(data, (Py_ssize_t)block->length);
    } else if (block->kind == KIND_ARRAY) {
        const struct layout *l = layout_of_spec(&self->layouts, block);
        if (!l) return;
        Py_INCREF((PyObject *)l->dtype); /* stolen */
        PyObject *array = PyArray_NewFromDescr(&PyArray_Type, l->dtype, l->ndim, l->shape, NULL, data, 0, NULL);
        if (array && PyArray_SetBaseObject((PyArrayObject *)array, Py_NewRef((PyObject *)message)) < 0)
            Py_CLEAR(array);
        self->current = array;
    }
    if (!self->current) PyErr_Clear(); /* no memory, perhaps: Python will say so */
}

static int lease(Inbox *self, int64_t deadline) {
    shmr_block *block = &self->message->block;
    shmr *handle = self->message->handle;
    int status = core.lease(handle, 0, 0, deadline == 0 ? 0 : SHMR_BRIEFLY, block);
    if (status == SHMR_WOULD_BLOCK && deadline != 0) {
        deadline = sleep_end(deadline);
        Py_BEGIN_ALLOW_THREADS
        status = core.lease(handle, 0, 0, deadline, block);
        Py_END_ALLOW_THREADS
    }
    if (status != SHMR_OK) return status;
    /* The sender decides what has a checksum: here it is always looked at. */
    if (block->length <= SMALL_BYTES) {
        status = core.check_payload(handle, block);
    } else {
        Py_BEGIN_ALLOW_THREADS
        status = core.check_payload(handle, block);
        Py_END_ALLOW_THREADS
    }
    if (status != SHMR_OK) core.release(handle, block);
    return status;
}

/* take(deadline): the next message, with the turn until it was `taken`; or `nothing`, without it */
static PyObject *inbox_take(Inbox *self, PyObject *deadline_object) {
    int64_t deadline = PyLong_AsLongLong(deadline_object);
    if (PyErr_Occurred()) return NULL;
    if (!turn_take(&self->turn)) return Py_NewRef(self->nothing);
    if (PyObject_Size(self->ready) == 0) { /* else an interrupted call has left something that comes first; likewise: */
        if (!self->current && !self->message->block.state && !self->failed && PyObject_Size(self->kept) == 0) {
            int status = lease(self, deadline);
            if (status == SHMR_OK) make_object(self);
            if (status == SHMR_CORRUPT) self->failed = status;
        }
        if (self->current) return Py_NewRef(self->current);
    }
    turn_leave(&self->turn);
    return Py_NewRef(self->nothing);
}

/* The message that is current was handed out: it is released with the last view of it. */
static int settle(Inbox *self) {
    if (!self->current) return 0;
    uint64_t nbytes = self->message->block.length;
    if (self->message->block.kind == KIND_BYTES) { /* there are no views */
        core.release(self->message->handle, &self->message->block);
    } else {
        Message *next = message_like(self->message);
        if (!next) return -1;
        Py_SETREF(self->message, next);
    }
    self->received++;
    self->bytes_received += nbytes;
    Py_CLEAR(self->current);
    return 0;
}

static PyObject *inbox_settle(Inbox *self, PyObject *unused) {
    (void)unused;
    if (settle(self) < 0) return NULL;
    Py_RETURN_NONE;
}

/* `taken = True`: who was given it by `take` has it. To set an attribute is no call: the interpreter lets no signal's
 * handler, and no other thread, run between this and the `return` that follows it. */
static int inbox_set_taken(Inbox *self, PyObject *value, void *unused) {
    (void)value;
    (void)unused;
    if (settle(self) < 0) return -1;
    turn_leave(&self->turn);
    return 0;
}

/* Forget what is leased, or is current: its block is damaged, or the end is closed. */
static PyObject *inbox_drop(Inbox *self, PyObject *unused) {
    (void)unused;
    Message *next = message_like(self->message);
    if (!next) return NULL;
    Py_SETREF(self->message, next);
    Py_CLEAR(self->current);
    Py_RETURN_NONE;
}

static PyObject *inbox_get_current(Inbox *self, void *unused) {
    (void)unused;
    return Py_NewRef(self->current ? self->current : self->nothing);
}

/* What Python has made of the message. */
static int inbox_set_current(Inbox *self, PyObject *object, void *unused) {
    (void)unused;
    Py_XSETREF(self->current, Py_XNewRef(object));
    const Message *message = self->message;
    if (!object || message->block.kind != KIND_ARRAY || !PyArray_CheckExact(object)) return 0;
    PyArrayObject *array = (PyArrayObject *)object;
    if (PyArray_IS_C_CONTIGUOUS(array) && PyArray_DATA(array) == message->base + message->block.offset &&
        (uint64_t)PyArray_NBYTES(array) == message->block.length && !layout_of_spec(&self->layouts, &message->block))
        remember(&self->layouts, array, &message->block);
    return 0;
}

static PyMethodDef inbox_methods[] = {
    {"open", (PyCFunction)(void (*)(void))inbox_open, METH_FASTCALL,
     "From now on messages may come by `take`, one turn at a time, while `ready` is empty."},
    {"shut", (PyCFunction)inbox_shut, METH_NOARGS, "From now on none may."},
    {"take", (PyCFunction)inbox_take, METH_O, "The next message, then to be `taken`; or nothing: Python knows why."},
    {"settle", (PyCFunction)inbox_settle, METH_NOARGS, "The message that is current was handed out."},
    {"drop", (PyCFunction)inbox_drop, METH_NOARGS, "Forget what is leased, and what is current."},
    {NULL, NULL, 0, NULL}};
static PyGetSetDef inbox_getset[] = {
    {"current", (getter)inbox_get_current, (setter)inbox_set_current, "The message that is not settled.", NULL},
    {"taken", NULL, (setter)inbox_set_taken, "Set by who has got a message from `take`.", NULL},
    {NULL, NULL, NULL, NULL, NULL}};
static PyMemberDef inbox_members[] = {
    {"message", Py_T_OBJECT_EX, offsetof(Inbox, message), Py_READONLY, "what is leased, or can be leased into"},
    {"failed", Py_T_INT, offsetof(Inbox, failed), 0, "status of a message that is gone"},
    {"received", Py_T_ULONGLONG, offsetof(Inbox, received), Py_READONLY, "messages settled so far"},
    {"bytes_received", Py_T_ULONGLONG, offsetof(Inbox, bytes_received), Py_READONLY, "their bytes"},
    {NULL, 0, 0, 0, NULL}};
PyTypeObject InboxType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "shmengine._native._handles.Inbox",
    .tp_basicsize = sizeof(Inbox),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_doc = "The receiving direction of a channel.",
    .tp_new = inbox_new,
    .tp_dealloc = (destructor)inbox_dealloc,
    .tp_methods = inbox_methods,
    .tp_getset = inbox_getset,
    .tp_members = inbox_members,
};

int directions_init(void) {
    import_array1(-1);
    coroutine_thread = PyUnicode_InternFromString("_coroutine_thread");
    return coroutine_thread ? 0 : -1;
}
