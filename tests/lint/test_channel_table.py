"""The tables of docs/channels.md, what each mechanism can do and what each start changes, say what the constants do.

``python -m tests.lint.test_channel_table`` prints them.
"""

from __future__ import annotations

import importlib
import re

import pytest

from shmengine.channels import Capabilities
from shmengine.channels.link import Link
from shmengine.channels.open import MECHANISMS
from tests.helpers.partners import STARTS, Start
from tests.helpers.sources import ROOT

MARKED = r"<!-- {0}:begin -->\n(.*?)<!-- {0}:end -->"
WORDS = {
    "between_hosts": "between two machines",
    "in_place": "messages filled and read where they lie (`claim`, `lease`)",
    "compresses": "`compression=`",
    "priorities": "priorities",
    "reconnects": "outlives an interruption of its connection",
    "writable": "arrays arrive writable, as the receiver's own",
    "at_once_in_asyncio": "`areceive` sleeps until something comes (else it looks every 20 ms, more often at first)",
    "outlives_sender": "all that was sent arrives although its sender is killed right after",
}
WORDS_OF_STARTS = {
    "passed": "how its end gets there",
    "own_process": "has signals, and a death, of its own",
    "lost": "what the other end gets when it is killed; of a thread, when it has lost its end",
}


def capabilities_of(mechanism):
    """The constants of a mechanism: what its links have."""
    module = importlib.import_module(MECHANISMS[mechanism])
    links = [each for each in vars(module).values() if isinstance(each, type) and issubclass(each, Link)]
    (found,) = {each.capabilities for each in links if hasattr(each, "capabilities")}
    assert found.mechanism == mechanism
    return found


def table(columns, words):
    rows = [["", *columns], ["---"] * (1 + len(columns))]
    rows += [
        [said, *(shown(getattr(each, name)) for each in columns.values())] for name, said in words.items()
    ]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def shown(value):
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"`{value.__name__}`" if isinstance(value, type) else str(value)


TABLES = {
    "capabilities": (lambda: {mechanism: capabilities_of(mechanism) for mechanism in MECHANISMS}, WORDS),
    "starts": (lambda: STARTS, WORDS_OF_STARTS),
}


@pytest.mark.parametrize("name", TABLES)
def test_the_table_is_what_the_code_says(name):
    marked = re.search(MARKED.format(name), (ROOT / "docs" / "channels.md").read_text(), re.DOTALL)
    assert marked, "docs/channels.md has no table between its markers"
    columns, words = TABLES[name]
    assert marked[1] == table(columns(), words), (
        "paste what `python -m tests.lint.test_channel_table` prints into docs/channels.md"
    )


def test_every_capability_has_words():
    assert list(WORDS) == list(Capabilities._fields[1:])
    assert list(WORDS_OF_STARTS) == list(Start._fields)


if __name__ == "__main__":
    for columns, words in TABLES.values():
        print(table(columns(), words))
