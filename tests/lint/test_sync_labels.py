"""Every ordered access to shared memory names its partner.

The comment on the lines of the call, or on a line of its own directly above, carries a label: ``R3`` where
the releasing side of pair 3 is, ``A3`` on its acquiring side, ``S1`` on sequentially consistent accesses
that belong together. Several labels stand side by side: ``/* A2 R3: why */``.
"""

from __future__ import annotations

import re
from collections import defaultdict

from tests.helpers.sources import CSRC, c_code, c_comments, c_files

CALL = re.compile(r"\bshmr_(?:load|store|cas|or|and|add|exchange)_(acquire|release|acq_rel|seq_cst)\w*\s*\(")
LABEL = re.compile(r"\b[RAS]\d+\b")
NEEDS = {"acquire": "A", "release": "R", "acq_rel": "AR", "seq_cst": "S"}


def lines_of_call(code):
    """How many lines the call takes with which the code begins."""
    depth = 0
    for position, character in enumerate(code):
        depth += (character == "(") - (character == ")")
        if character == ")" and depth == 0:
            return code.count("\n", 0, position) + 1
    return 1


def read(sources):
    """(complaints, places of each label) over (name, text) pairs."""
    complaints = []
    places = defaultdict(set)
    for name, text in sources:
        comments = c_comments(text)
        code = c_code(text).split("\n")
        for index, line in enumerate(code):
            for match in CALL.finditer(line):
                place = f"{name}:{index + 1}"
                last = index + lines_of_call("\n".join([line[match.start() :], *code[index + 1 : index + 9]]))
                found = [label for comment in comments[index:last] for label in LABEL.findall(comment)]
                if not found and index and not code[index - 1].strip():
                    found = LABEL.findall(comments[index - 1])
                kinds = {label[0] for label in found}
                for label in found:
                    places[label].add(place)
                if not kinds & set(NEEDS[match[1]] + "S"):
                    complaints.append(f"{place}: {match[0]}...) needs a label like {NEEDS[match[1]][0]}1")
    for label, where in places.items():
        kind, number = label[0], label[1:]
        if kind == "S" and len(where) < 2:
            complaints.append(f"{label} stands alone at {min(where)}")
        partner = {"R": "A", "A": "R"}.get(kind)
        if partner and not places.get(partner + number):
            complaints.append(f"{label} at {', '.join(sorted(where))} has no {partner}{number}")
    return complaints, places


def test_every_ordered_access_is_labelled_and_each_label_has_its_partner():
    sources = [(path.name, path.read_text()) for path in c_files() if path.name != "shmr_atomics.h"]
    complaints, places = read(sources)
    assert not complaints, "\n".join(complaints)
    assert places, "no ordered access was found: the names of the wrappers have changed"


def rows(text):
    """Labels in the first column of the tables in the README's section on ordered pairs."""
    section = text.partition("## Ordered pairs")[2].partition("\n## ")[0]
    return {
        label
        for line in section.splitlines()
        if line.startswith("|")
        for label in LABEL.findall(line.split("|")[1])
    }


def test_every_label_has_a_row_in_the_readme_and_every_row_is_used():
    sources = [(path.name, path.read_text()) for path in c_files() if path.name != "shmr_atomics.h"]
    assert rows((CSRC / "README.md").read_text()) == set(read(sources)[1])


def test_rows_are_read_from_a_table():
    assert rows(
        "## Ordered pairs\n| pair | x |\n|---|---|\n| R1 A1 | A7 |\n| S2 | |\n## Else\n| R9 | |\n"
    ) == {
        "R1",
        "A1",
        "S2",
    }


PAIR = """
shmr_store_release(&x, 1); /* R1 publishes */
/* A1 sees it */
shmr_load_acquire(&x);
"""


def test_a_labelled_pair_is_fine():
    complaints, places = read([("a.c", PAIR)])
    assert not complaints
    assert set(places) == {"R1", "A1"}


def test_what_is_missing_is_seen():
    def seen(text):
        return read([("a.c", PAIR + text)])[0]

    assert seen("shmr_load_acquire(&x);")
    assert seen("/* A1 */\n\nshmr_load_acquire(&x);"), "one line above at most"
    assert seen("shmr_load_acquire(&x); /* A1 */\nshmr_load_acquire(&x);"), (
        "that is the label of the line above"
    )
    assert seen("shmr_load_acquire(&x); /* R1 is the wrong side */")
    assert seen('shmr_load_acquire(&x, "A1");'), "a string is no comment"
    assert seen("shmr_store_release(&x); // R2 without partner")
    assert seen("shmr_store_seq_cst(&x); // S1 alone")
    assert seen("shmr_cas_acq_rel(&x, 1, 2);")
    assert not seen("shmr_cas_acq_rel(&x, 1, 2); // A1 R1")
    assert not seen("shmr_or_seq_cst(&x); // S1\nshmr_load_seq_cst(&y); // S1")
    assert not seen("/* shmr_load_acquire(&x) */")
    assert not seen("if (shmr_cas_acq_rel(&x, f(1),\n    2)) // A1 R1\n    return;")
    assert seen("if (shmr_cas_acq_rel(&x, f(1),\n    2))\n    return; // A1 R1")
    assert not seen("shmr_load_relaxed(&x);")
