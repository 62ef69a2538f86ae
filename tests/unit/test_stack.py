"""What csrc/stack.c does between a signal and the stack, in processes that are asked as workers are."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import textwrap

import pytest

from shmengine._native import lib
from shmengine._native._handles import guard_stacks
from shmengine.descriptors import pipe
from shmengine.workers.stacks import _ASK, _TELL, Question, answers
from tests.helpers.scripts import ROOT, poll_until

SECONDS = 60
IMPORTS = """
import faulthandler, os, sys, threading
from shmengine.workers.stacks import answer
"""
ANSWERS = """
answer(int(sys.argv[1]))
"""


class Asked:
    """A process that answers, and ends when its input does."""

    def __init__(self, body, before=""):
        self.reading, writing = pipe("answers", os.O_NONBLOCK)
        script = IMPORTS + textwrap.dedent(before) + ANSWERS + body
        self.end = writing.number
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, str(self.end)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[self.end],
            cwd=ROOT,
        )
        writing.close()
        assert self.process.stdout.readline() == b"ready\n"

    def question(self):
        return Question(self.process.pid, self.reading, self.end, lambda: False)

    def stack(self):
        (stack,) = answers([self.question()], contextlib.nullcontext())
        return stack

    def send(self, number):
        assert lib.shmr_signal_main_thread(self.process.pid, number) == 0

    def finish(self):
        """Let it end as processes do, and return what it has said."""
        out, _ = self.process.communicate(timeout=SECONDS)
        assert self.process.returncode == 0
        return out.decode()

    def close(self):
        self.process.kill()
        self.process.communicate()
        self.reading.close()


@pytest.fixture
def asked():
    processes = []

    def start(*script):
        processes.append(Asked(*script))
        return processes[-1]

    yield start
    for process in processes:
        process.close()


IN_PYTHON = """
def turn():
    while waiting.is_alive():
        pass

waiting = threading.Thread(target=sys.stdin.read)
waiting.start()
print("ready", flush=True)
turn()
print("done")
"""

IN_C = """
def sleep():
    sys.stdin.read()

print("ready", flush=True)
sleep()
print("done")
"""


@pytest.mark.parametrize(("body", "function"), [(IN_PYTHON, "in turn"), (IN_C, "in sleep")])
def test_it_says_where_it_is_as_often_as_it_is_asked(asked, body, function):
    process = asked(body)
    poll_until(lambda: function in process.stack())
    for _ in range(3):
        assert function in process.stack()
    assert process.finish() == "done\n"


def test_it_says_nothing_unasked(asked):
    """The second signal may come when the first has been answered."""
    process = asked(IN_PYTHON)
    poll_until(lambda: "in turn" in process.stack())
    process.send(_TELL)
    assert "in turn" in process.stack()
    assert not select.select([process.reading.number], [], [], 0)[0]
    assert process.finish() == "done\n"


def test_a_stack_that_cannot_be_made_ends_all_the_same(asked):
    process = asked(
        IN_PYTHON,
        """
        def no_memory(*_):
            raise MemoryError

        faulthandler.dump_traceback = no_memory
        """,
    )
    process.send(_ASK)
    assert select.select([process.reading.number], [], [], SECONDS)[0]
    assert process.reading.read(100) == b"\0"
    assert process.finish() == "done\n"


def test_a_pipe_that_nobody_reads_harms_nobody(asked):
    """It is full: what is to be said is dropped."""
    process = asked(
        IN_PYTHON,
        """
        try:
            while os.write(int(sys.argv[1]), b"x" * 4096):
                pass
        except BlockingIOError:
            pass
        """,
    )
    for number in (_ASK, _TELL, _ASK):
        process.send(number)
    assert process.finish() == "done\n"


@pytest.mark.parametrize(
    "number", [0, -1, 65, 9, 32], ids=["none", "negative", "too high", "SIGKILL", "libc's"]
)
@pytest.mark.parametrize("place", range(3))
def test_numbers_that_are_no_signals(number, place):
    script = """
        import errno, signal, sys
        from shmengine._native._handles import guard_stacks

        numbers = [signal.SIGRTMAX - 20 + k for k in range(3)]
        numbers[int(sys.argv[1])] = int(sys.argv[2])
        try:
            guard_stacks(*numbers, 2, print)
        except OSError as error:
            print(error.errno == errno.EINVAL)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(place), str(number)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=True)
    assert done.stdout == "True\n"


def test_what_is_no_number():
    with pytest.raises(TypeError):
        guard_stacks("one", 2, 3, 4, print)
