"""docs/coverage.md lists what the tests do not cover: each line of code in it is one of the source, with a reason."""

from __future__ import annotations

import re

from tests.helpers.coverage import ENTRY, LIST, function_lines, listed

REASONS = re.split(r"^## ", LIST.read_text(), flags=re.MULTILINE)[1:]


def test_each_listed_line_is_in_the_source():
    gone = [
        f"{name}, {function}: {code}"
        for name, function, code in listed()
        if code not in function_lines(name, function)
    ]
    assert not gone, "\n".join(gone)


def test_none_is_listed_twice():
    assert len(set(listed())) == len(listed())


def test_each_list_is_preceded_by_its_reason():
    assert REASONS
    for part in REASONS:
        title, _, rest = part.partition("\n")
        reason, *entries = rest.strip().split("\n- ")
        assert entries, title
        assert reason.strip().endswith("."), title
        assert all(ENTRY.fullmatch(f"- {entry.strip()}") for entry in entries), title
