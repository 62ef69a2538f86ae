"""Rows and reports that are made up."""

from __future__ import annotations

import pytest

from shmengine.bench.plan import MIB
from shmengine.bench.results import Report, Row, Spread, Work


def made_up(target, nbytes, rate, trip, *, group="mechanism", mode="copy", cpu=1e-6, noise=0.05, error=None):
    """A row: `rate` messages a second, `trip` microseconds round."""
    return Row(
        target=target,
        group=group,
        mode=mode,
        nbytes=nbytes,
        slots=16,
        rate=Spread(rate, rate * (1 - noise), rate * (1 + noise)),
        cpu=Spread(cpu, cpu, cpu),
        latency=Spread(trip * 1e-6, trip * 0.9e-6, trip * 1.1e-6),
        p99=trip * 3e-6,
        rounds=9,
        messages=1000,
        trips=500,
        error=error,
    )


@pytest.fixture(autouse=True, scope="session")
def fonts():
    """matplotlib keeps the files of its fonts open."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure()
    FigureCanvasAgg(figure)
    figure.text(0, 0, "normal")
    figure.text(0, 0, "bold", fontweight="bold")
    figure.canvas.draw()


@pytest.fixture
def report():
    """A pipe that is good at small sizes, and a ring that is good at large ones."""
    rows = [
        made_up("shm", 64, 400_000, 9),
        made_up("shm", MIB, 20_000, 60, cpu=1e-5),
        made_up("pipe", 64, 390_000, 10),
        made_up("pipe", MIB, 500, 4_000, cpu=1e-3),
        made_up("socket", 64, 100_000, 90),
        made_up("socket", MIB, 2_000, 900, cpu=5e-4),
        made_up("shm", MIB, 40_000, 30, mode="block"),
        made_up("<rival>", 64, 900_000, 3, group="rival"),
        Row("lost", "rival", "copy", 64, 16, None, None, None, None, 0, 0, 0, "no answer within 5 s"),
    ]
    return Report(
        environment={"processor": "made up & <fast>", "load": "0.10 0.10 0.10"},
        plan={"sizes": [64, MIB], "repeats": 9},
        missing={"iceoryx2": "not installed: pip install iceoryx2"},
        rows=rows,
        recommendation=["At all sizes: <shm>."],
    )


@pytest.fixture
def work():
    """An engine that is good at one thing."""
    found = [
        Work("map & more", "<pool>", 2e-6, 5e-5, Spread(25.0, 24.0, 26.0), 9),
        Work("start", "python", 0.2, 0.1, Spread(0.5, 0.4, 0.6), 9),
    ]
    return Report({"processor": "made up"}, {"repeats": 9}, {}, [], [], found)
