"""What runs inside a worker: lease a task, call, commit the result, release the task.

Started as a program of its own (never as a copy of the user's), so nothing of the user's ``__main__`` is
run again. It never imports the pool.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import pickle
import signal
import sys
import time
import traceback
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import numpy as np

from shmengine import codec
from shmengine._native import ffi, lib
from shmengine._native.status import CLOSED, CORRUPT, INTERRUPTED, OK, TIMEOUT, detail, fail
from shmengine.arena import Arena
from shmengine.arrays import GivenReference, detach, has_views, owner_of
from shmengine.errors import Corrupt, MemoryBudgetExceeded
from shmengine.exceptions import encode_exception
from shmengine.leases import release_with
from shmengine.pickling import original_error
from shmengine.region import Region
from shmengine.workers import logs, messages, stacks
from shmengine.workers.held import HeldUp
from shmengine.workers.messages import (
    BATCH,
    BLOCK,
    BROKEN,
    LEAVING,
    OWN,
    PART,
    PLACED,
    PRIVATE,
    READ_ONLY,
    RESULT_RING,
    SHARED,
    SHORT,
    STARTING,
    TASK,
    TASK_RING,
    VALUE,
    WHOLE_BATCH,
)
from shmengine.workers.prints import flush_prints, print_lines
from shmengine.workers.scatter import BLOCK_SPEC, PLACED_SPEC, Plan, PlanRunner

__all__ = ["main"]

# NumPy's arrays from this size on are born in shared memory; smaller ones are as cheap to copy.
BORN_SHARED_BYTES = 32 << 10
FUNCTIONS_KEPT = 64
# Arrays that a function captures are private to each worker, and writable, up to this size together; larger ones
# are shared by all workers, read-only.
CAPTURED_COPY_BYTES = 1 << 20
IDLE_SECONDS = 0.25
PLANS_KEPT = 4
PLAN_IDLE_SECONDS = 0.005  # they hold arrays of the caller's, and are cheap to decode again
TIDY_NS = 50_000_000  # how often a busy worker looks for what it keeps and has not used lately
# Main feeds all workers: where there are no more cores than workers, it must not wait for its turn behind them.
NICE = 5

_ndarray = np.ndarray


def main(region_fd: int, parent_pidfd: int, setup_fd: int, stack_pipe: int, log_pipe: int) -> None:
    """Serve until the task ring is closed; end with the main process, whatever user code is doing."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's business
    lib.shmr_watch_parent(parent_pidfd)
    stacks.answer(stack_pipe)
    os.nice(NICE)
    # All workers have the same open file: one that read on from its position would be in the way of the others.
    setup = pickle.loads(os.pread(setup_fd, os.fstat(setup_fd).st_size, 0))
    os.close(setup_fd)
    os.set_inheritable(log_pipe, False)
    print_lines()
    if "authkey" in setup:
        import multiprocessing

        multiprocessing.current_process().authkey = setup["authkey"]
    sys.path[:] = setup["path"]
    sys.argv[:] = setup["argv"]
    with contextlib.suppress(OSError):
        os.chdir(setup["cwd"])
    region = Region.attach(region_fd)
    lib.shmr_watch_shortage(region.handle)
    lib.shmr_set_progress(region.handle, STARTING, 0)
    try:
        worker = Worker(region, setup)
        logs.send_home(log_pipe, setup["log_levels"], worker.current_task)
        worker.serve()
        if worker.leaves():
            region.stay()  # so that it is seen why
    except SystemExit:
        raise
    except BaseException:
        # An end like a death: leaving in good order would give back, unseen, the task that was being run.
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


class Worker:
    """The serving side of one worker process."""

    def __init__(self, region: Region, setup: dict[str, Any]) -> None:
        self.region = region
        self.arena = Arena(region, limit=setup["arena_limit"])
        messages.objects_kept_bytes = setup["arena_limit"] // 4
        self.payload_check = int(setup["payload_check"])
        self.initializer: bytes | None = setup["initializer"]
        self.tasks_left: float = setup["tasks"] or math.inf
        self.original_errors: bool = setup.get("original_errors", False)
        self.functions: OrderedDict[Any, Callable[..., Any]] = OrderedDict()
        self.prepared: dict[str, Any] = {}
        self.prepared_module = ""
        self.plans: dict[tuple[int, int], PlanRunner] = {}
        self.tidy_at = 0
        self.block = messages.empty_block()
        self.reply = messages.empty_block()
        self.named = ffi.new("shmr_ref[1]")
        self.held = HeldUp(self.hand_over)

    def serve(self) -> None:
        """Run tasks until there can be no more."""
        self.secure_room()
        self.arena.install(BORN_SHARED_BYTES)
        if self.initializer is not None:
            try:
                self.prepare(*codec.decode(self.initializer, copy=True))
            except BaseException as error:
                self.send(BROKEN, 0, codec.encode(encode_exception(error)), b"")
                raise
            self.initializer = None
        lib.shmr_set_progress(self.region.handle, 0, 0)
        lease = lib.shmr_lease
        handle = self.region.handle
        while not self.leaves():
            block = self.block
            deadline = -1
            if self.plans:
                deadline = time.monotonic_ns() + int(PLAN_IDLE_SECONDS * 1e9)
            elif messages.has_shared():
                deadline = time.monotonic_ns() + int(IDLE_SECONDS * 1e9)
            status = lease(handle, TASK_RING, self.payload_check, deadline, block)
            if status == OK:
                if block.kind == BLOCK:
                    self.run_block(block)
                else:
                    self.run(block)
            elif status == TIMEOUT:
                # Nothing to do: what is kept may be freed.
                if self.plans:
                    self.plans.clear()
                else:
                    messages.forget_shared()
            elif status == CLOSED:
                return
            elif status == CORRUPT and block.kind in (TASK, BLOCK):
                damage = Corrupt("the task was changed in shared memory, on its way to a worker", detail())
                self.answer(block.tag, [(False, encode_exception(damage))], 0)
            elif status != INTERRUPTED:
                fail(status, "lease a task")

    def leaves(self) -> bool:
        """Tell whether this worker has done its number of tasks."""
        return self.tasks_left <= 0

    def current_task(self) -> int | None:
        """Return the number, in its call, of the task that is being run; None if that is not known."""
        words = ffi.new("uint64_t[4]")
        slot = lib.shmr_find(self.region.handle, os.getpid())
        if slot < 0:
            return None
        lib.shmr_progress(self.region.handle, slot, words, words + 1, words + 2, words + 3)
        return None if words[0] in (0, STARTING) or words[1] == WHOLE_BATCH else int(words[1])

    def secure_room(self) -> None:
        """Hold a little memory for good: the piece of the region around it is ours, and has room for any error."""
        block = messages.empty_block()
        while (status := lib.shmr_claim(self.region.handle, 64, ffi.NULL, 0, -1, -1, block)) != OK:
            if status not in (INTERRUPTED, lib.SHMR_DENIED):
                fail(status, "claim the first block of a worker")

    def prepare(self, initializer: Callable[..., Any], initargs: tuple[Any, ...]) -> None:
        """Run the initializer; what it does to globals of a module that workers cannot import is for all functions.

        Those of ``__main__`` come by value, each with globals of its own, and would never see what it sets.
        """
        namespace = _own_globals(initializer)
        before = dict(namespace)
        initializer(*initargs)
        missing = object()
        self.prepared_module = namespace.get("__name__", "")
        self.prepared = {
            name: value for name, value in namespace.items() if before.get(name, missing) is not value
        }

    def tidy(self) -> int:
        """Let go of what other calls and tasks have left here, now and then; return the time."""
        now = time.perf_counter_ns()
        if now >= self.tidy_at:
            self.tidy_at = now + TIDY_NS
            for key in [key for key, runner in self.plans.items() if runner.used < now - TIDY_NS]:
                del self.plans[key]
            messages.forget_unused(now - int(IDLE_SECONDS * 1e9))
        return now

    def run(self, block: Any) -> None:
        """Run the calls of one batch and send what they returned."""
        tag = block.tag
        handle = self.region.handle
        start = self.tidy()
        results: list[tuple[bool | None, Any]] = []
        root: Any = None
        function: Any = None
        entropy: Any = None
        spec = ffi.buffer(block.spec, block.spec_bytes)[:]
        mode, own = spec[:1], spec[1:] == OWN
        lib.shmr_set_progress(handle, tag, WHOLE_BATCH)
        try:
            root = messages.frame_root(self.arena, block, writable=mode != READ_ONLY)
            function, entropy, indices, calls = messages.read_frame(
                root, self.resolve_writable if mode == SHARED else self.arena.resolve
            )
        except BaseException as error:
            results.append((None, encode_exception(error)))
            calls = indices = ()
        fn: Any = None
        todo = deque(zip(indices, calls, strict=True))
        calls = ()
        several = len(todo) > 1
        if several:
            self.held.watch(tag, todo, results)
        while todo:
            try:
                index, (args, kwargs) = todo.popleft()
            except IndexError:  # given back in this moment
                break
            self.tasks_left -= 1
            lib.shmr_set_progress(handle, tag, index)
            try:
                if fn is None:
                    fn = self.function(function)
                if mode == PRIVATE:
                    args, kwargs = _private(args, kwargs)
                if entropy is not None:
                    kwargs = {**(kwargs or {}), "rng": messages.task_rng(entropy, index)}
                value = [fn(*args, **kwargs) if kwargs else fn(*args)]
                if several:  # the next call may write to what this one has returned
                    detach(value, kept=self.comes_from_elsewhere)
                results.append((True, value.pop()))
            except BaseException as error:
                results.append((None if fn is None else False, encode_exception(error)))
                _forget_frames(error)
        args = kwargs = None
        if several:
            self.held.end()
        lib.shmr_set_progress(handle, tag, WHOLE_BATCH)
        elapsed = time.perf_counter_ns() - start
        flush_prints()
        self.answer(tag, results, elapsed, own=own)
        del results
        holder = [root]
        root = None
        self.settle(block, holder)

    def hand_over(self, tag: int, results: list[Any], rest: int) -> bool:
        """Send what the first tasks of a batch have returned, and give back the last ones; False: it does not fit.

        Not in the thread that runs tasks.
        """
        flush_prints()
        try:
            encoded = codec.encode(results, memmap_mode="r")
        except BaseException:
            encoded = codec.encode([self.sendable(result) for result in results], memmap_mode="r")
        return self.send(PART, tag, encoded, messages.pack_part(len(results), rest), messages.empty_block())

    def settle(self, block: Any, holder: list[Any]) -> None:
        """Release a task, or leave that to the last view of its bytes, which `holder` alone refers to.

        After its result is committed: if we die in between, main knows both.
        """
        if holder[0] is not None and has_views(holder):
            self.block = messages.empty_block()
            release_with(holder[0], self.region, block)
        else:
            lib.shmr_release(self.region.handle, block)
        lib.shmr_set_progress(self.region.handle, LEAVING if self.leaves() else 0, 0)

    def run_block(self, block: Any) -> None:
        """Run a block function once; see `shmengine.workers.scatter`."""
        tag = block.tag
        start = self.tidy()
        lib.shmr_set_progress(self.region.handle, tag, WHOLE_BATCH)
        root: Any = None
        blocks: Any = None
        kwargs: Any = None
        results: list[Any] = []
        placed = error = None
        try:
            *reference, first_tag = BLOCK_SPEC.unpack_from(ffi.buffer(block.spec))
            runner = self.runner(reference)
            index = tag - first_tag
            root = messages.frame_root(self.arena, block, writable=runner.private)
            blocks = runner.blocks(index, root)
            kwargs = runner.kwargs
            if runner.private:
                blocks, kwargs = _private(blocks, kwargs)
            if runner.entropy is not None:
                kwargs = {**kwargs, "rng": messages.task_rng(runner.entropy, index)}
            results = [runner.fn(*blocks, **kwargs)]
            blocks = kwargs = None
            placed = runner.place(index, results)
            runner.used = time.perf_counter_ns()
        except BaseException as caught:
            blocks = kwargs = None
            error = encode_exception(caught)
            _forget_frames(caught)
        flush_prints()
        if placed is not None:
            self.answer_placed(tag, *placed)
        else:
            results[:] = [(True, results[0]) if error is None else (False, error)]
            self.answer(tag, results, time.perf_counter_ns() - start)
        results.clear()
        holder = [root]
        root = None
        self.settle(block, holder)

    def runner(self, reference: list[int]) -> PlanRunner:
        """Return what runs the blocks of the plan that a reference names."""
        key = (reference[1], reference[2])
        runner = self.plans.get(key)
        if runner is None:
            frame = self.arena.resolve((*reference, 0))
            plan = Plan(*messages.read_frame(frame, self.arena.resolve))
            if len(self.plans) >= PLANS_KEPT:
                self.plans.clear()
            runner = PlanRunner(plan, self.function(plan.function), self.arena, self.payload_check)
            # The frame is kept, so its block, and with it the key, stays what it is.
            runner.frame = frame
            self.plans[key] = runner
        return runner

    def answer_placed(self, tag: int, nbytes: int, offset: int, check: int, reference: Any) -> None:
        """Say that a result is in its place, or where it is."""
        references, count = ffi.NULL, 0
        words = 0, 0, nbytes
        if reference is not None:
            references, count = self.named, 1
            references[0].block, references[0].generation = reference.block, reference.generation
            words = nbytes, offset, check
        self.check_sent(
            messages.write_bare(
                self.arena,
                PLACED,
                tag,
                PLACED_SPEC.pack(*words),
                references=references,
                count=count,
                payload_check=self.payload_check,
                block=self.reply,
            )
        )

    def check_sent(self, status: int) -> None:
        """End this worker if there is nobody to send results to."""
        if status == CLOSED:
            raise SystemExit(0)
        if status != OK:
            fail(status, "send a result")

    def answer(self, tag: int, results: list[Any], nanoseconds: int, *, own: bool = False) -> None:
        """Send the results of a batch, and empty the list; one that cannot be sent becomes the error that says so.

        With `own` only what was made here goes by reference.
        """
        owners: list[weakref.ref[Any]] = []
        check = bool(self.payload_check)

        def share(array: Any) -> Any:
            reference = self.arena.share(array)
            owner = owner_of(array)
            if reference is None or not self.arena.made_here(array, owner):
                return None if own else reference
            if owner.base is not None:
                return (
                    None  # memory of an array that lent it by other means: who may write to it, nobody knows
                )
            owners.append(weakref.ref(owner))
            return GivenReference(*reference)

        if len(results) == 1 and results[0][0]:
            number = messages.pack_number(results[0][1])
            if number is not None:
                self.check_sent(
                    messages.write_number(
                        self.arena,
                        tag,
                        nanoseconds,
                        number,
                        payload_check=self.payload_check,
                        block=self.reply,
                    )
                )
                return
        try:
            if len(results) == 1 and results[0][0]:
                encoded = codec.encode(
                    results[0][1], share=share, memmap_mode="r", check_given=check, label="result"
                )
                kind = VALUE
            else:
                encoded = codec.encode(results, share=share, memmap_mode="r", check_given=check)
                kind = BATCH
        except BaseException:
            kind = BATCH
            owners.clear()
            sendable = [self.sendable(result) for result in results]
            encoded = codec.encode(sendable, share=share, check_given=check)
        held = [reference for reference in encoded.references if self.arena.hold(reference)] if owners else []
        try:
            if owners:
                results.clear()
                encoded.named.clear()
            if any(owner() is not None for owner in owners):
                # The function keeps an array that it returned, and may write to it again: main gets a copy.
                try:
                    kept = codec.decode(
                        np.frombuffer(encoded.to_bytes(), np.uint8), resolve=self.arena.resolve
                    )
                    encoded = codec.encode(kept, memmap_mode="r")
                    del kept
                except BaseException as error:
                    kind = BATCH
                    encoded = codec.encode([(False, encode_exception(error))])
            spec = messages.pack_account(nanoseconds, encoded.bytes_inline, encoded.bytes_shared)
            if self.send(kind, tag, encoded, spec):
                return
        finally:
            for reference in held:
                self.arena.drop(reference)
            results.clear()
        shortage = encode_exception(_no_room(encoded.nbytes, self.region))
        self.send(SHORT, tag, codec.encode(shortage), messages.pack_account(nanoseconds, 0, 0))

    def comes_from_elsewhere(self, array: Any) -> bool:
        """Tell whether no function that runs here can write to this array: it is read from the region, or a file."""
        mapped = codec.mapping_behind(array)
        if mapped is not None:
            return mapped.mode == "r"
        owner = owner_of(array)
        if not self.arena.contains(array) or owner.flags.writeable:
            return False
        return not self.arena.made_here(array, owner)

    def sendable(self, result: tuple[bool | None, Any]) -> tuple[bool | None, Any]:
        """Return the result, or the error that it cannot be sent."""
        try:
            codec.encode(result[1], share=self.arena.share, label="result")
        except BaseException as error:
            return False, encode_exception(original_error(error) if self.original_errors else error)
        return result

    def send(self, kind: int, tag: int, encoded: codec.Encoded, spec: bytes, block: Any = None) -> bool:
        """Commit a message to the result ring; False if there will never be memory for it."""
        while True:
            status = messages.write_frame(
                self.arena,
                RESULT_RING,
                kind,
                tag,
                encoded,
                payload_check=self.payload_check,
                spec=spec,
                block=self.reply if block is None else block,
            )
            if status == OK:
                return True
            if status in (lib.SHMR_DENIED, lib.SHMR_TOO_LARGE):
                if encoded.nbytes > BORN_SHARED_BYTES:
                    return False
                continue  # a few bytes: there will be room for them
            self.check_sent(status)

    def function(self, encoded: Any) -> Callable[..., Any]:
        """Return the function that these bytes stand for; kept by its bytes, since a global of it may have changed."""
        if type(encoded) is not bytes:
            loaded: Callable[..., Any] = messages.load_shared(
                encoded, encoded.nbytes <= CAPTURED_COPY_BYTES, self.arena.resolve
            )
            return loaded
        fn = self.functions.get(encoded)
        if fn is None:
            fn = codec.decode(encoded, copy=True)
            namespace = _own_globals(fn) if self.prepared else {}
            if namespace.get("__name__") == self.prepared_module:
                namespace.update(self.prepared)
            self.functions[encoded] = fn
            if len(self.functions) > FUNCTIONS_KEPT:
                self.functions.popitem(last=False)
        return fn

    def resolve_writable(self, reference: Any) -> Any:
        """Return the memory that a reference names, to be written in place."""
        return self.arena.resolve(reference, writable=True)


def _own_globals(fn: Any) -> dict[str, Any]:
    """Return the globals of a function that came by value; empty for those of a module that is imported here."""
    while isinstance(fn, (functools.partial, MethodType)):
        fn = fn.func if isinstance(fn, functools.partial) else fn.__func__
    if not isinstance(fn, FunctionType):
        fn = type(fn).__call__
    namespace: dict[str, Any] = getattr(fn, "__globals__", {})
    module = sys.modules.get(namespace.get("__name__", ""))
    return {} if module is not None and module.__dict__ is namespace else namespace


def _private(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Return the arguments with private copies of arrays that are not private already."""
    args = tuple([_copied(a) for a in args])
    if kwargs:
        kwargs = {name: _copied(a) for name, a in kwargs.items()}
    return args, kwargs


def _copied(argument: Any) -> Any:
    if isinstance(argument, _ndarray) and not argument.flags.writeable:
        return argument.copy("K")
    return argument


def _forget_frames(error: BaseException) -> None:
    """Let the tracebacks of an error go, and with them the arrays in their frames."""
    seen = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        link.__traceback__ = None
        link = link.__cause__ or link.__context__


def _no_room(nbytes: int, region: Region) -> MemoryBudgetExceeded:
    budget = int(region.counters().budget)
    return MemoryBudgetExceeded(
        f"no room in shared memory for a result of {nbytes} bytes (memory budget {budget}), and nothing that"
        " could make room; give the engine a larger memory=, return less at once, or let earlier results go",
        nbytes,
        budget,
    )
