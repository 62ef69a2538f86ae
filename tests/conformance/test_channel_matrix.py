"""Every test of channels runs on each mechanism and each start of who has the other end, but for those listed here."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = sorted(set(HERE.glob("test_channel_*.py")) - {Path(__file__)})
AXES = ("mechanism", "how")

# What has no other end, or not with a partner, and why.
EXCEPT = {
    "test_channel_asyncio.py::test_both_in_one_loop": "the one loop is what is tested",
    "test_channel_messages.py::test_impossible_options": "arguments: there is no end yet",
    "test_channel_messages.py::test_impossible_timeouts": "arguments of one end",
    "test_channel_messages.py::test_no_such_mechanism": "arguments: there is no end yet",
    "test_channel_messages.py::test_the_best_mechanism": "which one is chosen, before anybody has an end",
    "test_channel_starts.py::test_as_an_argument_of_tasks": "two workers of one engine are what is tested",
}

# What runs on fewer of them, and why.
FEWER = {
    "test_channel_close.py::test_os_exit_is_a_death": "a thread that exits takes all of them along",
    "test_channel_faults.py": "shared memory has no wire on which something could be changed",
    "test_channel_roundtrips.py::test_more_than_two_gigabytes": "takes half a minute with one start for each mechanism",
    "test_channel_signals.py::test_a_partners_receive_is_interrupted": "a thread gets no signals",
    "test_channel_signals.py::test_a_partners_send_is_interrupted": "a thread gets no signals",
    "test_channel_starts.py::test_as_an_argument_of_a_process": "the start methods of multiprocessing",
}


def fixtures_and_tests(path):
    """What fixtures and tests of a file ask for (arguments, parameters), and which of them have axes of their own."""
    fixtures, tests, own = {}, {}, set()
    for node in ast.parse(path.read_text()).body:
        if not isinstance(node, ast.FunctionDef):
            continue
        asked = {argument.arg for argument in node.args.args}
        for decorator in node.decorator_list:
            name = ast.unparse(decorator)
            if name.startswith("pytest.fixture"):
                fixtures[node.name] = asked
            elif name.startswith("pytest.mark.parametrize"):
                names = ast.literal_eval(decorator.args[0])
                names = set(names.split(",") if isinstance(names, str) else names)
                asked |= names
                if names & set(AXES):
                    own.add(f"{path.name}::{node.name}")
        if node.name in AXES and path.name != "conftest.py":
            own.add(path.name)
        if node.name.startswith("test_"):
            tests[node.name] = asked
    return fixtures, tests, own


def all_asked(asked, fixtures):
    """With what fixtures ask for in turn."""
    found, more = set(), set(asked)
    while more:
        found |= more
        more = set().union(*(fixtures.get(name, set()) for name in more)) - found
    return found


COMMON, *_ = fixtures_and_tests(HERE / "conftest.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_each_takes_mechanism_and_start(path):
    fixtures, tests, own = fixtures_and_tests(path)
    assert tests
    assert own == {name for name in FEWER if name.partition("::")[0] == path.name}
    for name, asked in tests.items():
        complete = set(AXES) <= all_asked(asked, COMMON | fixtures)
        listed = f"{path.name}::{name}" in EXCEPT
        assert complete != listed, (
            f"{name}: it must either run on each mechanism and start, or be listed above"
        )


def test_the_list_names_tests():
    names = {f"{path.name}::{name}" for path in FILES for name in fixtures_and_tests(path)[1]}
    assert set(EXCEPT) <= names


def test_this_test_sees_what_fixtures_ask_for():
    assert set(AXES) <= all_asked({"ends"}, COMMON)
    assert "how" not in all_asked({"ends_here", "partners"}, COMMON)
