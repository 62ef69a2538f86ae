"""What the soak consists of. A new part is one line here."""

from __future__ import annotations

from dataclasses import dataclass

from tests.soak import engine, queues, ring
from tests.soak.commands import Run, c_test, command, python_tests


@dataclass(frozen=True)
class Part:
    """A part: ``run(seconds, seed)`` returns a `Report`; `share` is what it gets of the time, relative to others."""

    name: str
    share: float
    run: Run


PARTS = (
    Part("ring", 5, ring.run),
    Part("queues", 4, queues.run),
    Part("engine", 5, engine.run),
    Part("C ring, killed", 3, c_test("plain/stress_kill")),
    Part("C ring, killed, address sanitizer", 1, c_test("asan/stress_kill")),
    Part("C ring, address sanitizer", 1, c_test("asan/stress_ring")),
    Part("C ring, thread sanitizer", 1, c_test("tsan/stress_ring")),
    Part("any sequence", 1, python_tests("tests/property/test_ring_machine.py")),
    Part("stress tests", 3, python_tests("tests/stress/test_ring_stress.py")),
    Part(
        "channels",
        3,
        python_tests(
            "tests/conformance/test_channel_deaths.py",
            "tests/conformance/test_channel_signals.py",
            "tests/conformance/test_channel_roundtrips.py",
        ),
    ),
    Part("storms", 3, python_tests("tests/crash/test_storms.py")),
    Part("explorer", 4, command("make", "--silent", "-C", "csrc", "explore-long", "SECONDS={seconds}")),
    Part(
        "hostile bytes",
        2,
        command("make", "--silent", "-C", "tests/fuzz", "replay", "SECONDS={half}", "SEED={seed}"),
    ),
)
