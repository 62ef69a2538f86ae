"""Each example runs as it stands and prints its known line."""

from __future__ import annotations

import doctest
import importlib
import json
import sys
import types

import numpy as np
import pytest

from tests.helpers import ROOT, run_script
from tests.helpers.channels import MECHANISMS
from tests.helpers.limits import queues_for

EXPECTED = {
    "hello_map.py": "5000000 values, the last is 3.0; the sum of x is 2500000.0\n",
    "hello_ring.py": "100 frames, checksum 9900\n",
    "hello_put.py": "[0.0, 1.0, 4.0, 9.0, 16.0], bytes copied for the image: 0\n",
    "hello_crash.py": "[0, 1, 4, 9, 16, 25]\nafter 2 attempts: killed by SIGSEGV\n49\n",
}


def test_every_example_is_tested():
    assert {path.name for path in (ROOT / "examples").glob("hello_*.py")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_example(name):
    result = run_script(ROOT / "examples" / name, check=True)
    assert result.stdout == EXPECTED[name]


def test_grid_search_runs_unchanged():
    result = run_script(
        ROOT / "examples" / "grid_search.py", args=["--samples", "6000"], check=True, timeout=110
    )
    assert result.stdout.startswith("21 fits; copied to workers: 1 times the size of the samples\nridge 0.")


@pytest.mark.slow
def test_demo_on_a_small_input(tmp_path):
    result = run_script(ROOT / "examples" / "demo.py", args=["--bytes", "32 MiB"], check=True, timeout=110)
    assert "equal to plain NumPy" in result.stdout


def noisy(dtype):
    """Uneven numbers of this kind, floats with a NaN among them."""
    values = (np.random.default_rng(1).random((1500, 1000)) * 200).astype(dtype)
    if values.dtype.kind == "f":
        values[1234, 567] = np.nan
    return values


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "array"),
    [
        ("process", np.arange(2_000_000, dtype="i4").reshape(2000, 1000)),
        ("process", noisy("f4").reshape(-1)),
        ("serial", noisy("f2")),
        ("serial", noisy("f8").T),
        ("serial", noisy("u8") > 100),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.dtype}-{value.ndim}d",
)
def test_demo_on_a_file(tmp_path, backend, array):
    path = tmp_path / "input.npy"
    np.save(path, array)
    result = run_script(
        ROOT / "examples" / "demo.py", args=[str(path), "--backend", backend], check=True, timeout=110
    )
    assert "input.npy" in result.stdout
    assert "equal to plain NumPy" in result.stdout


@pytest.mark.parametrize(
    ("found", "expected", "terms", "agree"),
    [
        (np.float64(1e6), np.float64(1e6) * (1 + 1e-13), 10**6, True),
        (np.float64(1e6), np.float64(1e6) * (1 + 1e-6), 10**6, False),
        (np.float64("nan"), np.float64("nan"), 10, True),
        (np.float64("nan"), np.float64(1.0), 10, False),
        (np.float64(1.0), np.float64("nan"), 10, False),
        (np.float64(1.0), np.float32(1.0), 10, False),
        (np.int64(3), np.int64(4), 10, False),
        (np.array([1.0, np.nan]), np.array([1.0, np.nan]), 2, True),
        (np.array([1.0, np.nan]), np.array([1.0, 2.0]), 2, False),
        (np.array([1, 2]), np.array([1, 3]), 2, False),
        (np.array([1, 2]), np.array([1.0, 2.0]), 2, False),
    ],
)
def test_the_demo_knows_what_is_wrong(monkeypatch, found, expected, terms, agree):
    source = (ROOT / "examples" / "demo.py").read_text()
    demo = types.ModuleType("demo")
    monkeypatch.setitem(sys.modules, "demo", demo)  # where dataclasses look
    exec(source[: source.rindex("\nmain()")], demo.__dict__)
    assert (demo.disagreement(found, expected, terms) == "") is agree


@pytest.mark.parametrize("module", ["shmengine", "shmengine.engine.api"])
def test_examples_in_docstrings(module):
    assert doctest.testmod(importlib.import_module(module)) == (0, 5 if module == "shmengine" else 2)


def test_the_example_in_the_readme_runs():
    readme = (ROOT / "README.md").read_text()
    source = readme.split("```python\n", 1)[1].split("```", 1)[0]
    assert "__main__" not in source
    result = run_script(source, check=True)
    expected = [line.partition("# prints ")[2] for line in source.splitlines() if "# prints " in line]
    assert result.stdout.splitlines() == expected


LOG = """\
2026-05-20 10:00:0{0} install package:amd64 <none> 1.{1}
May 20 10:00:0{0} host sshd[{1}]: error: Failed password user=root port={1}
10.0.0.{0} - alice [20/May/2026:10:00:0{0} +0200] "GET /{1} HTTP/1.1" 404 17
Traceback of something without a time {1}

"""


@pytest.fixture
def log_file(tmp_path):
    path = tmp_path / "some.log"
    path.write_text("".join(LOG.format(number % 10, number) for number in range(1500)))
    return path


@pytest.fixture(autouse=True)
def queues(request):
    """What an example has of message queues the kernel counts with those of other tests."""
    with queues_for(request.getfixturevalue("mechanism") if "mechanism" in request.fixturenames else ""):
        yield


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_log_pipeline_survives_a_killed_worker(log_file, tmp_path, mechanism):
    output = tmp_path / "records.json"
    options = [
        "--mechanism",
        mechanism,
        "--workers",
        "2",
        "--bytes",
        "1",
        "--batch",
        "8 KiB",
        "--kill",
        "--check",
    ]
    result = run_script(
        ROOT / "examples" / "log_pipeline.py",
        args=[str(log_file), *options, "--output", str(output)],
        check=True,
    )
    assert f"6000 records through {mechanism} and 2 workers" in result.stdout
    assert "1 worker killed, 1 replaced" in result.stdout
    assert "byte for byte" in result.stdout
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["message"].split()[-1] for record in records[3::4]] == [
        str(number) for number in range(1500)
    ]
    assert records[1] == {
        "time": "1970-05-20T10:00:00+00:00",
        "format": "syslog",
        "level": "error",
        "fields": {"user": "root", "port": "0"},
        "message": "host sshd[0]: error: Failed password user=root port=0",
    }
    assert records[2]["time"] == "2026-05-20T08:00:00+00:00"
    assert (records[2]["level"], records[2]["fields"]["user"]) == ("warning", "alice")


@pytest.mark.parametrize("mechanism", ["auto", *MECHANISMS])
def test_log_pipeline_cuts_a_line_that_is_too_long(tmp_path, mechanism):
    lines = ["first", "".join(f"näher an {number} " for number in range(1_300_000)), "", "last"]
    assert len(lines[1].encode()) > 20 << 20
    log, output = tmp_path / "some.log", tmp_path / "records.json"
    log.write_text("\n".join(lines))
    options = ["--mechanism", mechanism, "--workers", "2", "--bytes", "1", "--kill", "--check"]
    result = run_script(
        ROOT / "examples" / "log_pipeline.py", args=[str(log), *options, "--output", str(output)], check=True
    )
    assert "1 worker killed, 1 replaced" in result.stdout
    assert "byte for byte" in result.stdout
    messages = [json.loads(line)["message"] for line in output.read_text().splitlines()]
    assert messages[0] == lines[0]
    assert messages[-1] == lines[-1]
    assert "".join(messages[1:-1]) == lines[1]
    assert max(map(len, messages)) < 1 << 20


def test_log_pipeline_says_what_it_needs(tmp_path):
    result = run_script(ROOT / "examples" / "log_pipeline.py", args=[str(tmp_path)])
    assert result.returncode == 1
    assert "name some" in result.stderr
