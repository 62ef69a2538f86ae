"""Code of the application closes every descriptor (as who becomes a daemon does), and opens files of its own.

These have our numbers then. The engine goes on or says clearly why not; no byte of ours comes into the application's
files, none of its descriptors is closed, none of its processes killed, nothing hangs and nothing is left.
"""

from __future__ import annotations

import pytest

from tests.helpers.scripts import ROOT, run_script

# KIND: what the application opens. Numbers up to 80 are more than an engine of two workers has.
APPLICATION = """
import fcntl, logging, os, select, signal, struct, subprocess, sys, tempfile, termios, time
import shmengine as shm
from tests.helpers.scripts import poll_until

KIND = {kind!r}
theirs = {{}}

def close_all_and_open_files():
    os.closerange(3, 4096)
    global child
    null = subprocess.DEVNULL
    child = subprocess.Popen(["sleep", "1000"], stdin=null, stdout=null, stderr=null)
    while KIND != "nothing" and max(theirs, default=0) < 80:
        if KIND == "files":  # they are always ready
            made = [os.open(tempfile.gettempdir(), os.O_TMPFILE | os.O_RDWR)]
            os.write(made[0], b"theirs")
            os.lseek(made[0], 3, os.SEEK_SET)
        elif KIND == "pipes":  # they never are, and who reads from one may wait for ever
            made = os.pipe()
        else:  # as ready as those of the dead, or of the living, whom a signal would kill
            made = [os.pidfd_open(child.pid)]
        theirs.update((fd, os.fstat(fd)) for fd in made)

def check():
    for fd, before in theirs.items():
        assert os.path.samestat(os.fstat(fd), before), f"{{fd}} was closed"
        if KIND == "files":
            assert os.lseek(fd, 0, os.SEEK_CUR) == 3, f"{{fd}} was read or written"
            assert os.pread(fd, 100, 0) == b"theirs", f"something was written to {{fd}}"
        elif KIND == "pipes":
            waiting = struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, b"1234"))[0]
            assert waiting == 0, f"something was written to {{fd}}"
    assert child.poll() is None, "the application's own child was killed"
    child.kill()
    child.wait()
    sys.stdout.flush()

def pids():
    return engine._backend.pids

def is_listening(pid):
    "Whether this process has an end of what a worker prints to."
    files = []
    for name in os.listdir("/proc/self/fd"):
        try:
            files.append(os.readlink(f"/proc/self/fd/{{name}}"))
        except OSError:
            continue
    return all(os.readlink(f"/proc/{{pid}}/fd/{{end}}") in files for end in (1, 2))

def kill(pid):
    "As the out-of-memory killer does; return when the engine knows."
    deaths = engine.stats().worker_deaths
    os.kill(pid, signal.SIGKILL)
    poll_until(lambda: engine.stats().worker_deaths > deaths, what="a death is seen")

def slow(_=None):
    time.sleep(1000)

engine = shm.Engine(2, memory="32 MiB")
assert list(engine.map(abs, range(20))) == list(range(20))
"""

KINDS = ["nothing", "files", "pipes", "children"]
every_kind = pytest.mark.parametrize("kind", KINDS)


def run(kind, then):
    return run_whole(APPLICATION.format(kind=kind) + "close_all_and_open_files()\n" + then + "\ncheck()\n")


def run_whole(source):
    result = run_script(source, env={"PYTHONPATH": str(ROOT)})
    assert result.returncode == 0, result.stdout + result.stderr
    return result


EVERYTHING = """
import numpy as np
assert list(engine.map(abs, range(-100, 0))) == list(range(100, 0, -1))
assert engine.submit(divmod, 7, 2).result() == (3, 1)
assert engine.map_blocks(np.sqrt, np.arange(10_000.0)).sum() == np.sqrt(np.arange(10_000.0)).sum()

def say(i):
    print(f"printed {i}", flush=True)
    print(f"complained {i}", file=sys.stderr, flush=True)
    logging.getLogger("them").warning("logged %d", i)

logging.basicConfig(format="%(message)s", stream=sys.stdout)
for pid in pids():
    poll_until(lambda: is_listening(pid), what="the pipes are open again")
list(engine.map(say, range(50)))

future = engine.submit(slow)
poll_until(lambda: any("in slow" in stall.stack for stall in engine.stalls(0)), what="its stack")
(late,) = engine.map(slow, [0], timeout=0.2, on_error="return")  # at the other worker
assert isinstance(late, shm.TaskTimeout), late
assert "in slow" in late.__notes__[0], late.__notes__
poll_until(lambda: len(pids()) == 1, what="the dead is buried")
(survivor,) = pids()
kill(survivor)
try:
    future.result()
except shm.WorkerDied as error:
    assert "the descriptor of this region was closed by other code" in str(error), error
else:
    sys.exit("who ran that?")
engine.close()
"""


@every_kind
def test_everything(kind):
    """Tasks, output, stalls and time limits as ever; the dead are not replaced, and in the end the error says why."""
    result = run(kind, EVERYTHING)
    for i in range(50):
        assert f"printed {i}\n" in result.stdout
        assert f"logged {i}\n" in result.stdout
        assert f"complained {i}\n" in result.stderr
    assert "could not be replaced, and is tried again: the descriptor of this region was" in result.stderr


ENDS = {
    "closed": "engine.close()",
    "closed at once": "engine.submit(slow)\nengine.close(wait=False)",
    "forgotten": "del engine",
    "exit": "",
}


@pytest.mark.parametrize("end", ENDS)
def test_ends(end):
    assert run("files", "engine.submit(abs, 1).result()\n" + ENDS[end]).stderr == ""


@every_kind
def test_an_idle_worker_that_dies_is_noticed(kind):
    """Nothing else happens in the engine."""
    run(
        kind,
        """
for pid in pids():
    os.kill(pid, signal.SIGKILL)
poll_until(lambda: not pids(), what="they are buried")
engine.close()
""",
    )


def test_other_code_has_waited_for_a_worker():
    """There is nothing any more by which it could be watched."""
    run(
        "nothing",
        """
first, second = pids()
os.kill(first, signal.SIGKILL)
try:
    os.waitpid(first, 0)
except ChildProcessError:
    pass
poll_until(lambda: pids() == [second], what="it is buried")
assert engine.submit(abs, -1).result() == 1
engine.close()
""",
    )


def test_twice():
    run(
        "files",
        """
for pid in pids():
    poll_until(lambda: is_listening(pid), what="the pipes are open again")
check()
theirs.clear()
close_all_and_open_files()
assert list(engine.map(abs, range(20))) == list(range(20))
engine.close()
""",
    )


def test_what_an_initializer_inherits_is_not_taken_for_another_file():
    """No worker gets a file of the application in its place, and that file stays open."""
    run_whole(
        """
import multiprocessing, os, tempfile
import shmengine as shm
from shmengine.errors import ShmError

connection, other = multiprocessing.Pipe()
executor = shm.Executor(1, initializer=print, initargs=(connection,))
for name in os.listdir("/proc/self/fd"):
    fd = int(name)
    try:
        same_file = os.path.samestat(os.fstat(fd), os.fstat(connection.fileno()))
    except OSError:  # that of the directory
        continue
    if same_file and fd != connection.fileno():
        os.close(fd)
        theirs = os.open(tempfile.gettempdir(), os.O_TMPFILE | os.O_RDWR)
        assert theirs == fd
try:
    executor.submit(abs, 1)
except ShmError as error:
    assert "what an initializer inherits was closed by other code" in str(error), error
else:
    raise AssertionError("with what did it start?")
executor.shutdown()
os.fstat(theirs)
"""
    )


# --- the same in a worker -------------------------------------------------------------------------------

IN_A_WORKER = (
    APPLICATION.replace("shm.Engine(2,", "shm.Engine(1,")
    + """
def daemonize():
    import __main__
    __main__.kept = close_all_and_open_files, check
    close_all_and_open_files()

def log(i):
    logging.getLogger("them").error("logged %d", i)
    return i

def still_theirs():
    import __main__
    return __main__.kept[1]()

engine.submit(daemonize).result()
"""
)


@every_kind
def test_a_worker_writes_to_no_file_of_the_application_s(kind):
    source = (
        IN_A_WORKER.format(kind=kind)
        + """
assert list(engine.map(log, range(3))) == [0, 1, 2]
future = engine.submit(lambda: time.sleep(0.5))
poll_until(lambda: "its descriptors were closed" in str(engine.stalls(0)), what="it does not answer")
future.result()
engine.submit(still_theirs).result()
(late,) = engine.map(slow, [0], timeout=0.2, on_error="return")
assert isinstance(late, shm.TaskTimeout), late
assert engine.submit(abs, -1).result() == 1
engine.close()
"""
    )
    run_whole(source)
