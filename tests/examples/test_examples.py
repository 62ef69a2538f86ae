"""Each example runs as it stands and prints its known line."""

from __future__ import annotations

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


@pytest.mark.slow
def test_demo_on_a_file(tmp_path):
    import numpy as np

    path = tmp_path / "input.npy"
    np.save(path, np.arange(3_000_000, dtype="i4").reshape(3000, 1000))
    result = run_script(ROOT / "examples" / "demo.py", args=[str(path)], check=True, timeout=110)
    assert "input.npy" in result.stdout
    assert "equal to plain NumPy" in result.stdout


def test_the_example_in_the_readme_runs():
    readme = (ROOT / "README.md").read_text()
    source = readme.split("```python\n", 1)[1].split("```", 1)[0]
    assert "__main__" not in source
    result = run_script(source, check=True)
    expected = [line.partition("# prints ")[2] for line in source.splitlines() if "# prints " in line]
    assert result.stdout.splitlines() == expected
