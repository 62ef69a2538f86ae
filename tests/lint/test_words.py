"""One word for one thing (docs/glossary.md): names that say something else are not given."""

from __future__ import annotations

import ast
import re

import pytest

from tests.helpers.sources import ROOT, c_files, c_identifiers, python_files, python_identifiers

# What to say instead of a name (where cursors are), of a part between underscores, of a phrase.
CURSORS = {
    "head": "lease_cursor: the word means opposite ends in different libraries",
    "tail": "commit_cursor: the same",
}
PARTS = {
    "chunk": "block",
    "chunks": "blocks",
    "zerocopy": "by reference",
    "master": "main",
    "slave": "worker",
    "segment": "region",
    "fifo": "ring",
}
PHRASES = {
    "zero_copy": "by reference: say from where to where nothing is copied",
    "thread_safe": "how many producers, how many consumers",
    "poison_pill": "stop task",
    "write_index": "commit_cursor",
    "read_index": "lease_cursor",
    "wrap_count": "cycle",
}


WITH_CURSORS = {"arena", "leases", "queues", "region", "ring"}


def complaint(name, *, cursors):
    lowered = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    if cursors and (word := lowered.strip("_")) in CURSORS:
        return f"{name}: say {CURSORS[word]}"
    for phrase, instead in PHRASES.items():
        if phrase in lowered:
            return f"{name}: say {instead}"
    for part in lowered.split("_"):
        if part in PARTS:
            return f"{name}: say {PARTS[part]}"
    return None


def complaints(identifiers, *, cursors=True):
    found = ((each.line, complaint(each.name, cursors=cursors)) for each in identifiers)
    return [f"line {line}: {text}" for line, text in found if text]


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_python(path):
    identifiers = python_identifiers(ast.parse(path.read_text()))
    assert not complaints(identifiers, cursors=path.stem in WITH_CURSORS)


@pytest.mark.parametrize("path", c_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_c(path):
    assert not complaints(c_identifiers(path.read_text()))


@pytest.mark.parametrize("name", ["tail", "_head", "chunk_bytes", "MyChunk", "zero_copy_send", "master"])
def test_this_test_sees(name):
    assert complaint(name, cursors=True)


@pytest.mark.parametrize("name", ["chunksize", "stderr_tail", "header", "overhead", "detail", "masterful"])
def test_this_test_allows(name):
    assert complaint(name, cursors=True) is None


def test_the_tail_of_a_text_is_one():
    assert complaint("tail", cursors=False) is None


def test_only_names_count_not_prose():
    assert not complaints(python_identifiers(ast.parse("'''chunk'''\n# tail\nprint('head')\nx.tail()")))
    assert not complaints(c_identifiers('/* chunk */ char *x = "head"; // tail'))
    assert len(complaints(c_identifiers("int head, tail;"))) == 2
