"""The table in csrc/README.md of what lies where is what the compiler says."""

from __future__ import annotations

import re
import subprocess

from tests.helpers.sources import CSRC, c_without_comments

MARKED = re.compile(r"<!-- layout:begin -->\n```text\n(.*?)```\n<!-- layout:end -->", re.DOTALL)
STRUCT = re.compile(r"^struct (\w+) \{(.*?)^\};", re.DOTALL | re.MULTILINE)
DECLARATION = re.compile(r"^\s*(?:\w+\s+)+?((?:\w+(?:\[[^\]]*\])*\s*,\s*)*\w+(?:\[[^\]]*\])*);", re.MULTILINE)


def fields_of(layout):
    """{struct: its fields, in order, without padding} of a header."""
    found = {}
    for struct, body in STRUCT.findall(c_without_comments(layout)):
        names = [
            re.sub(r"\[.*", "", name.strip())
            for names in DECLARATION.findall(body)
            for name in names.split(",")
        ]
        found[struct] = [name for name in names if not re.fullmatch(r"pad\d*", name)]
    return found


def fields_in(table):
    """{struct: its fields} of the printed table."""
    found = {}
    for line in table.splitlines():
        if line.startswith("struct "):
            fields = found.setdefault(line.split()[1], [])
        elif line.startswith("  "):
            fields.append(line.split()[0])
    return found


def test_the_table_is_what_the_program_prints():
    printed = subprocess.run(
        ["make", "--silent", "--no-print-directory", "-C", str(CSRC), "layout"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    marked = MARKED.search((CSRC / "README.md").read_text())
    assert marked, "csrc/README.md has no table between its markers"
    assert marked[1] == printed, "paste the output of `make -C csrc layout` into csrc/README.md"


def test_the_table_has_every_field():
    table = MARKED.search((CSRC / "README.md").read_text())[1]
    assert fields_in(table) == fields_of((CSRC / "shmr_layout.h").read_text())


def test_fields_are_read_from_a_header():
    header = """
struct a {
    shmr_word x; /* not y; */
    char pad0[8 - 4];
    shmr_word u, v[3], w;
    sem_t bell;
};
"""
    assert fields_of(header) == {"a": ["x", "u", "v", "w", "bell"]}
