"""A future that calls back: as `concurrent.futures.Future`, as far as it goes."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError, Future

import pytest

from shmengine.engine.callback_future import CallbackFuture


@pytest.fixture(params=[Future, CallbackFuture])
def future(request):
    return request.param()


def test_a_result(future):
    told = []
    future.add_done_callback(told.append)
    assert not future.done()
    assert not future.running()
    assert future.set_running_or_notify_cancel()
    assert future.running()
    assert not future.cancel()
    assert told == []
    future.set_result(5)
    assert told == [future]
    assert future.done()
    assert not future.running()
    assert not future.cancelled()
    assert not future.cancel()
    assert future.result() == 5
    assert future.exception() is None


def test_an_error(future):
    future.set_running_or_notify_cancel()
    error = ValueError("it")
    future.set_exception(error)
    told = []
    future.add_done_callback(told.append)  # at once
    assert told == [future]
    assert future.exception() is error
    with pytest.raises(ValueError, match="it"):
        future.result()


def test_cancelled_before_it_began(future):
    told = []
    future.add_done_callback(told.append)
    assert future.cancel()
    assert told == [future]
    assert future.cancel()
    assert future.cancelled()
    assert future.done()
    assert not future.set_running_or_notify_cancel()
    assert told == [future]
    with pytest.raises(CancelledError):
        future.result()


def test_it_begins_or_is_cancelled_and_never_both():
    began = cancelled = 0
    for _ in range(300):
        future, barrier, kept = CallbackFuture(), threading.Barrier(2), []

        def cancel(future=future, barrier=barrier, kept=kept):
            barrier.wait()
            kept.append(future.cancel())

        thread = threading.Thread(target=cancel)
        thread.start()
        barrier.wait()
        begins = future.set_running_or_notify_cancel()
        thread.join()
        assert [begins] == [not gone for gone in kept]
        began, cancelled = began + begins, cancelled + kept[0]
    assert began + cancelled == 300


def test_it_says_what_it_is():
    future = CallbackFuture()
    assert "pending" in repr(future)
    future.set_running_or_notify_cancel()
    assert "running" in repr(future)
    future.set_result(None)
    assert "ended" in repr(future)
