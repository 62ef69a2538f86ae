"""A log processor: a reader cuts real log files into records, workers parse them, a writer gets them in order.

    python examples/log_pipeline.py                                   this machine's own logs
    python examples/log_pipeline.py access.log /srv/logs              other files and folders
    python examples/log_pipeline.py --mechanism mqueue --workers 4    pipe, mqueue, shm, socket, or auto
    python examples/log_pipeline.py --kill --check                    a worker is killed; the answer is checked

Every worker has a channel of its own::

    reader ── batch 0, 3, ... ──► worker ──┐
           ── batch 1, 4, ... ──► worker ──┼──► writer: puts the batches in order
           ── batch 2, 5, ... ──► worker ──┘

A batch is acknowledged by its answer. When a worker dies the channel says `PeerLost`, after all answers that it had
sent; the batches without one go to a replacement. So each record is written exactly once, whoever is killed.

A line of more than 256 KiB may be cut: its parts are records, in order, and nothing between them is missing. So
whatever a file has in it, a batch and its answer fit into a channel.
"""

from __future__ import annotations

import argparse
import datetime as dt
import hashlib
import json
import multiprocessing
import os
import re
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np

import shmengine as shm
from shmengine.config import format_bytes, parse_bytes

IN_FLIGHT = 3  # batches that a worker has at once: one in work, and the next ones on their way
TICK_SECONDS = 0.5
LINE_BYTES = 1 << 18  # a line that is longer may be cut

# --- reading: files -> batches of whole lines -------------------------------------------------------


def log_files(paths: list[str]) -> dict[str, int]:
    """The files of these paths, folders searched, that can be read and are text, in a fixed order; their bytes now."""
    found = []
    for path in paths:
        if not os.path.isdir(path):
            found.append(path)
            continue
        for folder, _, names in sorted(os.walk(path)):
            found += [os.path.join(folder, name) for name in sorted(names)]
    return {path: os.path.getsize(path) for path in found if is_text(path)}


def is_text(path: str) -> bool:
    """Whether this is a file with something in it, and no zeros, which text has not."""
    if not os.path.isfile(path):  # to open a pipe would wait for whoever writes to it
        return False
    try:
        with open(path, "rb") as file:
            return b"\0" not in (start := file.read(4096)) and bool(start)
    except OSError:
        return False


def batches(files: dict[str, int], times: int, batch_bytes: int) -> Iterator[np.ndarray]:
    """Cut the files, read so many times and as far as they went, into runs of whole lines of about this size."""
    pending = bytearray()
    for _ in range(times):
        for path, left in files.items():
            with open(path, "rb") as file:
                while data := file.read(min(batch_bytes, left)):
                    left -= len(data)
                    pending += data
                    if len(pending) >= batch_bytes and (end := pending.rfind(b"\n") + 1 or cut(pending)):
                        yield np.frombuffer(bytes(pending[:end]), np.uint8)
                        del pending[:end]
            if pending and not pending.endswith(b"\n"):
                pending += b"\n"  # the next file begins a new record
    if pending:
        yield np.frombuffer(bytes(pending), np.uint8)


def cut(line: bytearray) -> int:
    """How much of a line whose end is not in sight becomes a record: none, or, if it is long, up to a character."""
    if len(line) < LINE_BYTES:
        return 0
    end = len(line) - 1
    while end > len(line) - 4 and line[end] & 0xC0 == 0x80:  # inside of a character of UTF-8
        end -= 1
    return end


# --- parsing: what the workers do ------------------------------------------------------------------

MONTHS = {
    name: number
    for number, name in enumerate(
        ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"], 1
    )
}
ISO = re.compile(
    rb"\W{0,2}(?:[\w-]+ )?(\d{4})-(\d\d)-(\d\d)[T ]+(\d\d):(\d\d):(\d\d)(?:[.,](\d{1,6}))?\S*\s*(.*)",
    re.DOTALL,
)
SYSLOG = re.compile(rb"(?:<\d+>)?([A-Z][a-z]{2}) +(\d{1,2}) (\d\d):(\d\d):(\d\d) (.*)", re.DOTALL)
ACCESS = re.compile(
    rb'(\S+) \S+ (\S+) \[(\d\d)/([A-Z][a-z]{2})/(\d{4}):(\d\d):(\d\d):(\d\d) ([+-]\d{4})\] "([^"]*)" (\d{3}) (\d+|-)'
)
LEVEL = re.compile(
    rb"\b(debug|info|notice|warn(?:ing)?|err(?:or)?|crit(?:ical)?|fatal|alert|emerg|panic|exception|fail(?:ed|ure)?)\b",
    re.IGNORECASE,
)
LEVELS = {b"w": "warning", b"e": "error", b"c": "critical", b"a": "critical", b"p": "critical", b"d": "debug"}
FIELD = re.compile(rb'(?<!\S)([A-Za-z_][\w.-]*)=("[^"]*"|\S*)')


def parse(line: bytes) -> dict[str, Any]:
    """One record: time, format, level, fields, and the text that is left."""
    record: dict[str, Any] = {"time": None, "format": "text", "level": "info", "fields": {}}
    rest = line
    if match := ACCESS.match(line):
        host, user, day, month, year, hour, minute, second, zone, request, status, nbytes = match.groups()
        offset = dt.timedelta(hours=int(zone[:3]), minutes=int(zone[:1] + zone[3:]))
        record["time"] = when(year, MONTHS.get(month.decode()), day, hour, minute, second) and when(
            year, MONTHS.get(month.decode()), day, hour, minute, second, zone=offset
        )
        record["format"] = "access"
        record["level"] = "error" if status >= b"500" else "warning" if status >= b"400" else "info"
        names = ("host", "user", "request", "status", "bytes")
        record["fields"] = {
            name: text(value)
            for name, value in zip(names, (host, user, request, status, nbytes), strict=True)
        }
        rest = request
    elif match := ISO.match(line):
        *parts, fraction, rest = match.groups()
        record["time"] = when(*parts, fraction=fraction or b"")
        record["format"] = "iso"
    elif match := SYSLOG.match(line):
        month, *parts, rest = match.groups()
        record["time"] = when(b"1970", MONTHS.get(month.decode()), *parts)  # such logs do not say the year
        record["format"] = "syslog"
    if record["format"] != "access":
        if match := LEVEL.search(rest):
            word = match[1].lower()
            record["level"] = LEVELS.get(word[:1], "info") if word[:1] != b"f" else "error"
        record["fields"] = {text(name): text(value.strip(b'"')) for name, value in FIELD.findall(rest)}
    record["message"] = text(rest)
    return record


def when(
    year: bytes,
    month: bytes | int | None,
    day: bytes,
    hour: bytes,
    minute: bytes,
    second: bytes,
    *,
    fraction: bytes = b"",
    zone: dt.timedelta = dt.timedelta(0),
) -> str | None:
    """A time in ISO 8601; None if there is no such time."""
    try:
        micros = int(fraction.ljust(6, b"0")) if fraction else 0
        moment = dt.datetime(
            int(year),
            int(month or 0),
            int(day),
            int(hour),
            int(minute),
            min(int(second), 59),
            micros,
            dt.UTC,
        )
        return (moment - zone).isoformat()
    except (ValueError, OverflowError):
        return None


def text(raw: bytes) -> str:
    """Log files may have any bytes in them."""
    return raw.decode("utf-8", "backslashreplace")


def parse_batch(batch: Any) -> dict[str, Any]:
    """Parse every line: the records as lines of JSON in one array, and how many there were of what."""
    counts: Counter[str] = Counter()
    lines = []
    for line in bytes(batch).splitlines():
        if not line.strip():
            continue
        record = parse(line)
        counts["records"] += 1
        counts[f"level {record['level']}"] += 1
        counts[f"format {record['format']}"] += 1
        counts["fields"] += len(record["fields"])
        counts["without a time"] += record["time"] is None
        lines.append(json.dumps(record, ensure_ascii=False, separators=(",", ":")))
    written = "".join(f"{line}\n" for line in lines).encode("utf-8", "backslashreplace")
    return {"records": np.frombuffer(written, np.uint8), "counts": dict(counts)}


def work(end: shm.End) -> None:
    """A worker: take batches, answer each, until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's business
    with end:
        for number, batch in end:
            end.send((number, parse_batch(batch)))


# --- the main process: reader and writer ------------------------------------------------------------


@dataclass
class Worker:
    """A worker process, its channel, and the batches that it has not answered."""

    process: Any
    end: shm.End
    unanswered: deque[tuple[int, np.ndarray]] = field(default_factory=deque)


class Pipeline:
    """Deals out batches, collects answers, replaces the dead."""

    def __init__(self, mechanism: str, workers: int, batch_bytes: int, output: BinaryIO) -> None:
        self.mechanism = mechanism
        self.batch_bytes = batch_bytes
        self.output = output
        self.counts: Counter[str] = Counter()
        self.digest = hashlib.sha256()
        self.killed = self.replaced = self.sent_again = 0
        self._answers: dict[int, dict[str, Any]] = {}  # came before their turn
        self._next = 0  # the number of the batch that is written next
        self.workers = [self._start() for _ in range(workers)]

    def _start(self) -> Worker:
        mine, theirs = shm.channel(
            self.mechanism,
            message_bytes=self.batch_bytes,
            # Records are larger than the lines that they come from, of which one may come in front of a batch; all that
            # is in flight shall fit.
            buffer_bytes=max(8 << 20, IN_FLIGHT * (16 * self.batch_bytes + 4 * LINE_BYTES)),
        )
        process = multiprocessing.get_context("spawn").Process(target=work, args=(theirs,))
        process.start()
        theirs.close()  # the worker's alone now: so that its death is seen
        return Worker(process, mine)

    def run(self, source: Iterator[np.ndarray], kill_at: int | None = None) -> None:
        """Process everything; at the batch of this number, kill a worker that is at work."""
        numbered = enumerate(source)
        exhausted = False
        while True:
            for worker in self.workers:
                while not exhausted and len(worker.unanswered) < IN_FLIGHT:
                    if (batch := next(numbered, None)) is None:
                        exhausted = True
                        break
                    worker.unanswered.append(batch)
                    self._send(worker, batch)
                    if batch[0] == kill_at:
                        os.kill(worker.process.pid, signal.SIGKILL)
                        self.killed += 1
            oldest = self._oldest()
            if oldest is None:
                return
            self._receive(oldest)

    def _oldest(self) -> Worker | None:
        """Whose answer is written next: this order keeps what has to wait for its turn small."""
        busy = [worker for worker in self.workers if worker.unanswered]
        return min(busy, key=lambda worker: worker.unanswered[0][0], default=None)

    def _send(self, worker: Worker, batch: tuple[int, np.ndarray]) -> None:
        """Send, and take answers while the channel is full: a worker that cannot answer takes nothing either."""
        while True:
            try:
                worker.end.send(batch, 0 if len(worker.unanswered) > 1 else TICK_SECONDS)
                return
            except (shm.WouldBlock, shm.Timeout):
                if len(worker.unanswered) > 1 and not self._receive(worker):
                    return
            except (shm.PeerLost, shm.EndOfStream):
                self._replace(worker)  # and all that was not answered is sent again, this batch as well
                return

    def _receive(self, worker: Worker) -> bool:
        """Take the next answer of a worker, and write all whose turn it is; False: it is dead, and was replaced."""
        try:
            number, answer = worker.end.receive()
        except (shm.PeerLost, shm.EndOfStream):
            self._replace(worker)
            return False
        expected, _ = worker.unanswered.popleft()
        assert number == expected, f"the answer to batch {number} instead of {expected}"
        self._answers[number] = answer
        while (answer := self._answers.pop(self._next, None)) is not None:
            self._write(answer)
            self._next += 1
        return True

    def _write(self, answer: dict[str, Any]) -> None:
        self.output.write(answer["records"])
        self.digest.update(answer["records"])
        self.counts.update(answer["counts"])

    def _replace(self, worker: Worker) -> None:
        """Start another one in the place of a dead worker, and give it what had not been answered."""
        worker.end.close()
        worker.process.join()
        worker.process.close()
        self.replaced += 1
        if self.replaced > 100:
            sys.exit("workers keep dying: given up")
        again = list(worker.unanswered)
        self.sent_again += len(again)
        other = self._start()
        worker.process, worker.end = other.process, other.end
        worker.unanswered.clear()
        for batch in again:
            worker.unanswered.append(batch)
            self._send(worker, batch)

    def close(self) -> None:
        """Let all workers end."""
        for worker in self.workers:
            worker.end.close()
        for worker in self.workers:
            worker.process.join()
            worker.process.close()


def main() -> None:
    """The whole example."""
    parser = argparse.ArgumentParser(
        description="Parse log files in worker processes, over one of four mechanisms."
    )
    parser.add_argument(
        "paths", nargs="*", default=["/var/log"], help="files and folders (default: /var/log)"
    )
    parser.add_argument("--mechanism", default="auto", choices=("pipe", "mqueue", "shm", "socket", "auto"))
    parser.add_argument(
        "--workers",
        type=int,
        default=min(6, len(os.sched_getaffinity(0))),
        help="default: one a core, up to six",
    )
    parser.add_argument(
        "--bytes", default="64 MiB", help="less than this is read again and again (default: 64 MiB)"
    )
    parser.add_argument(
        "--batch", default="256 KiB", help="how much a worker gets at once (default: 256 KiB)"
    )
    parser.add_argument("--output", default=os.devnull, help="where the records go, as lines of JSON")
    parser.add_argument("--kill", action="store_true", help="kill a worker in the middle")
    parser.add_argument("--check", action="store_true", help="compare with a serial pass")
    options = parser.parse_args()
    if options.workers < 1:
        parser.error("--workers must be at least 1")

    files = log_files(options.paths)
    size = sum(files.values())
    if not size:
        sys.exit(f"no log files with text in {' '.join(options.paths)}: name some")
    wanted, batch_bytes = parse_bytes(options.bytes), parse_bytes(options.batch)
    times = max(1, -(-wanted // size))
    again = f": little, so they are read {times} times" if times > 1 else ""
    if batch_bytes < 1:
        parser.error("--batch must be at least one byte")
    print(f"{len(files)} log files, {format_bytes(size)}{again}", flush=True)
    kill_at = size * times // batch_bytes // 2 if options.kill else None

    with open(options.output, "wb") as output:
        pipeline = Pipeline(options.mechanism, options.workers, batch_bytes, output)
        mechanism = pipeline.workers[0].end.capabilities.mechanism
        start = time.perf_counter()
        try:
            pipeline.run(batches(files, times, batch_bytes), kill_at)
        finally:
            pipeline.close()
        seconds = time.perf_counter() - start
    counts = pipeline.counts
    print(
        f"{counts['records']} records through {mechanism} and {options.workers} workers in {seconds:.1f} s:"
        f" {format_bytes(int(size * times / seconds))}/s"
    )
    for name in sorted(counts):
        if name != "records":
            print(f"  {name}: {counts[name]}")
    if options.kill:
        print(
            f"{pipeline.killed} worker killed, {pipeline.replaced} replaced,"
            f" {pipeline.sent_again} batches without an answer sent again"
        )
    if options.check:
        digest, expected = hashlib.sha256(), Counter[str]()
        for batch in batches(files, times, batch_bytes):
            answer = parse_batch(batch)
            digest.update(answer["records"])
            expected.update(answer["counts"])
        if digest.digest() != pipeline.digest.digest() or expected != counts:
            sys.exit("WRONG: not what a serial pass writes")
        print("The same, byte for byte, as a serial pass.")


if __name__ == "__main__":  # the workers import this script
    main()
