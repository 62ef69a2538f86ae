/* SPDX-License-Identifier: BSD-3-Clause */
/* What a worker does when it is asked where it is (shmengine/workers/stacks.py).
 *
 * ASK is a signal of Python's: `tell_stack` is called between two steps of the interpreter. TELL and TELL_AND_DIE are
 * faulthandler's, whose handler reads the frames at once, wherever that is. What comes before the handlers is here.
 */
#include "handles.h"

#include <errno.h>
#include <signal.h>
#include <unistd.h>

#if PY_VERSION_HEX >> 16 == 0x030D
#define Py_BUILD_CORE
#include <internal/pycore_frame.h>
#endif

static void (*before[NSIG])(int); /* Python's handler, and faulthandler's */
static volatile sig_atomic_t unanswered;
static int pipe_end = -1;
static PyObject *dump_traceback; /* faulthandler's */

/* No stack has one: its reader knows where it ends. */
static void end_answer(void) {
    if (write(pipe_end, "", 1) < 0) return; /* full: nobody reads */
}

static void on_ask(int number) {
    unanswered = 1;
    before[number](number);
}

/* Whenever C calls Python the evaluation loop has an entry frame, the innermost one while Python's own are made and
 * cleared. CPython 3.13.0 takes it for one of code, and crashes (python/cpython#123967); later ones step over it. */
static void without_entry_frame(int number) {
#if PY_VERSION_HEX >> 16 == 0x030D
    PyThreadState *thread = PyGILState_GetThisThreadState();
    _PyInterpreterFrame *innermost = thread ? thread->current_frame : NULL;
    int skip = innermost && innermost->owner == FRAME_OWNED_BY_CSTACK;
    if (skip) thread->current_frame = innermost->previous;
    before[number](number);
    if (skip) thread->current_frame = innermost;
#else
    before[number](number);
#endif
}

static void on_tell(int number) {
    if (!unanswered) return; /* it was in C when that was decided, and has answered meanwhile: it runs Python */
    unanswered = 0;
    without_entry_frame(number);
    int error = errno;
    end_answer();
    errno = error;
}

static int precede(int number, void (*handler)(int)) {
    struct sigaction action;
    if (number < 1 || number >= NSIG) {
        errno = EINVAL;
        return -1;
    }
    if (sigaction(number, NULL, &action) < 0) return -1;
    before[number] = action.sa_handler;
    action.sa_handler = handler;
    return sigaction(number, &action, NULL);
}

PyObject *guard_stacks(PyObject *Py_UNUSED(module), PyObject *args) {
    int ask, tell, tell_and_die, pipe;
    PyObject *dump;
    if (!PyArg_ParseTuple(args, "iiiiO", &ask, &tell, &tell_and_die, &pipe, &dump)) return NULL;
    pipe_end = pipe;
    Py_XSETREF(dump_traceback, Py_NewRef(dump));
    if (precede(ask, on_ask) < 0 || precede(tell, on_tell) < 0 || precede(tell_and_die, without_entry_frame) < 0)
        return PyErr_SetFromErrno(PyExc_OSError);
    Py_RETURN_NONE;
}

PyObject *tell_stack(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(args)) {
    if (!unanswered) Py_RETURN_NONE; /* answered from C meanwhile */
    unanswered = 0;
    PyObject *done = PyObject_CallFunction(dump_traceback, "iO", pipe_end, Py_False);
    if (!done) PyErr_Clear(); /* no memory, or no room on the stack: not for the task to know */
    Py_XDECREF(done);
    end_answer();
    Py_RETURN_NONE;
}
