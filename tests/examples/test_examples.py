"""Each example runs as it stands and prints its known line."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest

from tests.helpers import ROOT, run_script

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


def test_the_example_in_the_readme_runs():
    readme = (ROOT / "README.md").read_text()
    source = readme.split("```python\n", 1)[1].split("```", 1)[0]
    assert "__main__" not in source
    result = run_script(source, check=True)
    expected = [line.partition("# prints ")[2] for line in source.splitlines() if "# prints " in line]
    assert result.stdout.splitlines() == expected
