"""The table of what each mechanism of a channel can do, in docs/channels.md, is what the constants in the code say.

``python -m tests.lint.test_channel_table`` prints it.
"""

from __future__ import annotations

import importlib
import re

from shmengine.channels import Capabilities
from shmengine.channels.link import Link
from shmengine.channels.open import MECHANISMS
from tests.helpers.sources import ROOT

MARKED = re.compile(r"<!-- capabilities:begin -->\n(.*?)<!-- capabilities:end -->", re.DOTALL)
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


def capabilities_of(mechanism):
    """The constants of a mechanism: what its links have."""
    module = importlib.import_module(MECHANISMS[mechanism])
    links = [each for each in vars(module).values() if isinstance(each, type) and issubclass(each, Link)]
    (found,) = {each.capabilities for each in links if hasattr(each, "capabilities")}
    assert found.mechanism == mechanism
    return found


def table():
    columns = [capabilities_of(mechanism) for mechanism in MECHANISMS]
    rows = [["", *MECHANISMS], ["---"] * (1 + len(columns))]
    rows += [
        [WORDS[name], *(shown(getattr(each, name)) for each in columns)] for name in Capabilities._fields[1:]
    ]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def shown(value):
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def test_the_table_is_what_the_code_says():
    marked = MARKED.search((ROOT / "docs" / "channels.md").read_text())
    assert marked, "docs/channels.md has no table between its markers"
    assert marked[1] == table(), (
        "paste what `python -m tests.lint.test_channel_table` prints into docs/channels.md"
    )


def test_every_capability_has_words():
    assert list(WORDS) == list(Capabilities._fields[1:])


if __name__ == "__main__":
    print(table(), end="")
