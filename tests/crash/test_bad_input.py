"""What cannot work gives an error of its own, at the call or on the future, and harms nothing else.

Here is what only processes can have: things that do not pickle. The rest is in tests/conformance.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import threading
import traceback

import numpy as np
import pytest

from shmengine.engine import Engine
from shmengine.errors import (
    ArrayError,
    BlockError,
    Closed,
    RemoteError,
    RemoteTraceback,
    SerializationError,
    StaleReference,
    UseAfterFork,
)
from tests.helpers import poll_until


@pytest.fixture(scope="module")
def shared():
    with Engine(2, memory="64 MiB") as engine:
        yield engine


@pytest.fixture
def engine(shared):
    yield shared
    assert list(shared.map(abs, range(-20, 0))) == list(range(20, 0, -1))
    poll_until(lambda: shared.stats().tasks_in_flight == 0, what="abandoned tasks have ended")
    assert shared.stats().worker_deaths == 0


def raised_by(future_or_results):
    """Return what a future has, or a stream raises."""
    if hasattr(future_or_results, "exception"):
        return future_or_results.exception()
    with pytest.raises(BaseException) as caught:
        list(future_or_results)
    return caught.value


def both(engine, fn, *args):
    """The error of the same task as a future and in the middle of a stream."""
    yield raised_by(engine.submit(fn, *args))
    items = zip(*[args] * 3, strict=True)
    yield raised_by(engine.map(fn, *items))
    returned = list(engine.map(fn, *zip(*[args] * 3, strict=True), on_error="return"))
    yield from returned


# --- arguments ------------------------------------------------------------------------------------


class Config:
    def __init__(self):
        self.name = "model"
        self.guard = {"lock": threading.Lock()}


UNPICKLABLE = {
    "lock": (threading.Lock, "args[0]"),
    "in a list": (lambda: [1, threading.Lock()], "args[0][1]"),
    "in a dict": (lambda: {"a": {"b": threading.Lock()}}, "args[0]['a']['b']"),
    "attribute": (Config, "args[0].guard['lock']"),
    "generator": (lambda: (i for i in range(3)), "args[0]"),
    "file": (lambda: sys.stdout.buffer, "args[0]"),
    "connection": (lambda: multiprocessing.Pipe()[0], "args[0]"),
    "in an object array": (lambda: np.array([None, threading.Lock()], object), "args[0][1]"),
}


@pytest.mark.parametrize("kind", UNPICKLABLE)
def test_an_unpicklable_argument_is_raised_at_the_call_with_its_path(engine, kind):
    make, path = UNPICKLABLE[kind]
    with pytest.raises(SerializationError) as caught:
        engine.submit(id, make())
    assert caught.value.path == path
    assert path in str(caught.value)
    assert caught.value.__cause__ is not None
    with pytest.raises(SerializationError) as caught:
        list(engine.map(id, [1, 2, make(), 4]))
    assert caught.value.path == path
    with pytest.raises(SerializationError) as caught:
        engine.put(make())
    assert caught.value.path == path.replace("args[0]", "obj")


def test_an_unpicklable_keyword_has_its_name(engine):
    with pytest.raises(SerializationError) as caught:
        engine.submit(dict, good=1, bad=[threading.Lock()])
    assert caught.value.path == "kwargs['bad'][0]"
    with pytest.raises(SerializationError) as caught:
        engine.map_blocks(lambda b, lock: b, np.zeros(3), lock=threading.Lock())
    assert caught.value.path == "kwargs['lock']"


def test_an_unpicklable_function_is_raised_at_the_call(engine):
    lock = threading.Lock()

    def locked(x):
        with lock:
            return x

    for call in (
        lambda: engine.submit(locked, 1),
        lambda: list(engine.map(locked, [1])),
        lambda: engine.map_blocks(locked, np.zeros(3)),
        lambda: engine.reduce(locked, np.zeros(3), combine=max),
    ):
        with pytest.raises(SerializationError, match="lock") as caught:
            call()
        assert caught.value.path == "fn.<closure lock>"


def test_an_unpicklable_initializer_is_raised_by_the_constructor():
    lock = threading.Lock()
    with pytest.raises(SerializationError, match="lock"):
        Engine(1, memory="16 MiB", initializer=lambda: lock)
    with pytest.raises(SerializationError, match="lock"):
        Engine(1, memory="16 MiB", initializer=abs, initargs=[lock])


class FailsInWorker:
    """Can be pickled, but not unpickled there."""

    def __reduce__(self):
        return fail_to_load, ("argument",)


def fail_to_load(what):
    raise LookupError(f"cannot load the {what}")


def test_an_argument_that_does_not_unpickle_is_the_task_s_error(engine):
    for error in both(engine, print, FailsInWorker()):
        assert isinstance(error, SerializationError)
        assert "LookupError: cannot load the argument" in str(error)
        assert isinstance(error.__cause__, RemoteTraceback)
        assert "fail_to_load" in str(error.__cause__)
    items = [FailsInWorker() if i == 50 else i for i in range(200)]
    results = list(engine.map(lambda x: x, items, on_error="return"))
    assert isinstance(results.pop(50), SerializationError)
    assert results == [i for i in range(200) if i != 50]
    good_and_bad = list(engine.map(lambda x: x, [1, FailsInWorker(), 3], on_error="return"))
    assert isinstance(good_and_bad[1], SerializationError)
    assert [good_and_bad[0], good_and_bad[2]] == [1, 3]


def test_a_function_that_does_not_unpickle_is_the_task_s_error(engine):
    broken = FailsInWorker()
    error = engine.submit(lambda: broken).exception()
    assert isinstance(error, SerializationError)
    assert "LookupError: cannot load the argument" in str(error)
    assert isinstance(error.__cause__, RemoteTraceback)


# --- results --------------------------------------------------------------------------------------


def make_lock(x=None):
    import threading

    return {"a": [threading.Lock()]}


def make_generator(x=None):
    return (i for i in range(3))


@pytest.mark.parametrize(
    ("fn", "path"), [(make_lock, "result['a'][0]"), (make_generator, "result")], ids=["lock", "generator"]
)
def test_an_unpicklable_result_is_the_task_s_error_with_its_path(engine, fn, path):
    for error in both(engine, fn, 1):
        assert isinstance(error, SerializationError)
        assert error.path == path
        assert path in str(error)
    results = list(engine.map(lambda i: make_lock() if i == 7 else i, range(40), on_error="return"))
    error = results.pop(7)
    assert isinstance(error, SerializationError)
    assert results == [i for i in range(40) if i != 7]


class FailsInMain:
    """Pickles in the worker, raises here."""

    def __init__(self, error):
        self.error = error

    def __reduce__(self):
        return raise_outside_of_workers, (self.error,)


def raise_outside_of_workers(error):
    import os

    if "SHMENGINE_WORKER" not in os.environ:
        raise error
    return FailsInMain(error)


@pytest.mark.parametrize("kind", [LookupError, SystemExit, RecursionError])
def test_a_result_that_does_not_unpickle_is_the_task_s_error(engine, kind):
    for error in both(engine, lambda kind: FailsInMain(kind("cannot load the result")), kind):
        assert isinstance(error, SerializationError if issubclass(kind, Exception) else kind)
        assert "cannot load the result" in str(error)


def test_a_result_that_does_not_unpickle_spoils_no_other(engine):
    results = list(
        engine.map(lambda i: FailsInMain(LookupError()) if i == 50 else i, range(200), on_error="return")
    )
    assert isinstance(results.pop(50), SerializationError)
    assert results == [i for i in range(200) if i != 50]


# --- exceptions -----------------------------------------------------------------------------------


class NeedsTwo(Exception):
    """The classic: its arguments are not those of its class."""

    def __init__(self, code, text):
        super().__init__(f"{code}: {text}")
        self.code = code


class HoldsLock(Exception):
    def __init__(self):
        super().__init__("holds a lock")
        self.lock = threading.Lock()


class Huge(Exception):
    pass


def raise_two():
    raise NeedsTwo(42, "two arguments")


def raise_lock():
    import threading

    class Local(Exception):
        def __init__(self):
            super().__init__("holds a lock")
            self.lock = threading.Lock()

    raise Local


def raise_huge():
    raise Huge("x" * 5_000_000, np.ones(1_000_000))


def raise_local():
    class Local(Exception):
        pass

    raise Local("of a class that nobody else has")


def raise_chained():
    try:
        raise_two()
    except NeedsTwo as error:
        raise KeyError("outer") from error


def raise_group():
    raise ExceptionGroup("several", [ValueError("one"), KeyError("two")])


def raise_fails_to_print():
    class Bad(Exception):
        def __str__(self):
            raise RuntimeError("no text")

        __repr__ = __str__

    raise Bad


def test_an_exception_that_does_not_unpickle_comes_as_text(engine):
    for error in both(engine, lambda *_: raise_two(), 1):
        assert isinstance(error, (RemoteError, NeedsTwo))
        assert "42: two arguments" in str(error)
        if isinstance(error, RemoteError):
            assert error.type_name.endswith("NeedsTwo")
        assert "in raise_two" in str(error.__cause__)


def test_an_exception_that_does_not_pickle_comes_as_text(engine):
    for error in both(engine, lambda *_: raise_lock(), 1):
        assert isinstance(error, RemoteError)
        assert error.type_name.endswith("Local")
        assert "holds a lock" in str(error)
        assert "in raise_lock" in str(error.__cause__)


def test_an_exception_with_huge_arguments_arrives(engine):
    for error in both(engine, lambda *_: raise_huge(), 1):
        assert type(error).__name__ in ("Huge", "RemoteError")
        assert "in raise_huge" in str(error.__cause__)


def test_an_exception_of_a_local_class_arrives(engine):
    for error in both(engine, lambda *_: raise_local(), 1):
        assert "of a class that nobody else has" in str(error)
        assert "Local" in "".join(traceback.format_exception_only(error))


def test_the_chain_of_an_exception_is_in_its_traceback(engine):
    for error in both(engine, lambda *_: raise_chained(), 1):
        assert isinstance(error, KeyError)
        text = "".join(traceback.format_exception(error))
        assert "42: two arguments" in text
        assert "direct cause" in text
        assert "in raise_chained" in text


def test_an_exception_group_arrives_whole(engine):
    for error in both(engine, lambda *_: raise_group(), 1):
        assert isinstance(error, ExceptionGroup)
        assert [type(part) for part in error.exceptions] == [ValueError, KeyError]


def test_an_exception_that_cannot_be_printed_arrives(engine):
    for error in both(engine, lambda *_: raise_fails_to_print(), 1):
        assert isinstance(error, BaseException)
        assert "raise_fails_to_print" in str(error.__cause__)


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_exceptions_that_end_programs_end_only_their_task(engine, kind):
    def leave(*_):
        raise kind(7)

    for error in both(engine, leave, 1):
        assert type(error) is kind
        assert error.args == (7,)
    with pytest.raises(kind):
        engine.map_blocks(leave, np.zeros(3))


def test_futures_have_exceptions_of_their_own(engine):
    def fail():
        raise ValueError("same text")

    one, two = (engine.submit(fail).exception() for _ in range(2))
    assert one is not two
    assert one.__notes__ == two.__notes__ == ["submit(fail)"]


def test_a_deep_recursion_is_an_error(engine):
    def deeper(n):
        return deeper(n + 1)

    for error in both(engine, deeper, 0):
        assert isinstance(error, RecursionError)


# --- blocks ---------------------------------------------------------------------------------------


def test_object_arrays_go_through_blocks_by_pickle(engine):
    x = np.array([1, "two", (3,), None] * 5, object)
    assert engine.map_blocks(lambda b: b[::-1], x, block_bytes=32).shape == x.shape
    (total,) = engine.map(len, [x])
    assert total == 20
    y = engine.map_blocks(lambda b: np.array([str(v) for v in b], object), x, block_bytes=32)
    assert y.tolist() == [str(v) for v in x]


def test_object_arrays_cannot_be_shared(engine):
    with pytest.raises(ArrayError, match="object"):
        engine.empty(3, object)
    with pytest.raises(ArrayError):
        engine.map_blocks(lambda b: b, np.array([{}, []], object), writable="shared")


@pytest.mark.parametrize(
    ("fn", "text"),
    [
        (lambda b: None, "NoneType"),
        (list, "list"),
        (lambda b: (x for x in b), "generator"),
        (lambda b: 5.0, "float"),
        (lambda b: b[1:], "length"),
    ],
    ids=["None", "list", "generator", "scalar", "length"],
)
def test_blocks_that_do_not_fit(engine, fn, text):
    with pytest.raises((BlockError, SerializationError), match=text) as raised:
        engine.map_blocks(fn, np.zeros(100), block_bytes=80)
    if fn is list:
        assert "returned by <class 'list'>" in str(raised.value.__cause__)
    elif raised.type is BlockError:  # there is no traceback any more of who has returned
        code = fn.__code__
        assert f'File "{code.co_filename}", line {code.co_firstlineno}, in' in str(raised.value.__cause__)
    else:
        assert raised.value.__cause__ is not None


# --- state ----------------------------------------------------------------------------------------


def test_a_closed_engine_says_so():
    engine = Engine(1, memory="16 MiB")
    ref = engine.put([1])
    engine.close()
    for call in (
        lambda: engine.submit(abs, 1),
        lambda: engine.map(abs, [1]),
        lambda: engine.map_blocks(abs, np.zeros(3)),
        lambda: engine.put(1),
        lambda: engine.empty(3),
    ):
        with pytest.raises(Closed, match="this engine is closed; make a new one"):
            call()
    assert ref.get() == [1]


def test_a_reference_of_another_engine_is_copied_or_refused(engine):
    with Engine(1, memory="16 MiB") as other:
        plain, shared = other.put([np.ones(100_000)]), other.put([other.full(100_000, 1.0)])
        assert engine.submit(lambda arrays: arrays[0].sum(), plain).result() == 100_000
        with contextlib.suppress(StaleReference, SerializationError):
            assert engine.submit(lambda arrays: arrays[0].sum(), shared).result() == 100_000


def test_a_forked_child_says_so(engine):
    results = engine.map(abs, range(10))
    next(results)
    ref = engine.put(np.arange(100_000))
    future = engine.submit(abs, -3)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            for call in (
                lambda: engine.submit(abs, 1),
                lambda: engine.map(abs, [1]),
                lambda: next(results),
                lambda: engine.map_blocks(np.sqrt, np.zeros(3)),
                lambda: engine.put(1),
                lambda: engine.empty(3),
                lambda: engine.allocator().__enter__(),
            ):
                try:
                    call()
                except UseAfterFork:
                    continue
                os._exit(2)
            with np.errstate():
                assert ref.get().sum() == 4999950000  # what was read stays readable
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert future.result() == 3
    assert list(results) == list(range(1, 10))
