"""Reading our own source, for the tests in tests/lint/."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "shmengine"
CSRC = ROOT / "csrc"

# A comment, a string or a character of C; strings come first where they start first.
_C_TOKEN = re.compile(
    r"""(?P<comment>//[^\n]*|/\*.*?\*/)|(?P<text>"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')""", re.DOTALL
)


def python_files() -> list[Path]:
    """Every module of the package."""
    return sorted(PACKAGE.rglob("*.py"))


def c_files() -> list[Path]:
    """The C core and its tests; not the models, which are programs of their own."""
    return sorted(
        path
        for path in CSRC.rglob("*.[ch]")
        if not {"model", "build"} & set(path.relative_to(CSRC).parts[:-1])
    )


def _blank(text: str) -> str:
    return re.sub(r"[^\n]", " ", text)


def c_code(text: str) -> str:
    """C text with comments and strings blanked out; lines and columns stay."""
    return _C_TOKEN.sub(lambda match: _blank(match[0]), text)


def c_without_comments(text: str) -> str:
    """C text with comments blanked out; lines and columns stay."""
    return _C_TOKEN.sub(lambda match: _blank(match[0]) if match["comment"] else match[0], text)


def c_comments(text: str) -> list[str]:
    """What is in comments, line by line (as many entries as `text` has lines)."""
    kept, position = [], 0
    for match in _C_TOKEN.finditer(text):
        kept.append(_blank(text[position : match.start()]))
        kept.append(match[0] if match["comment"] else _blank(match[0]))
        position = match.end()
    kept.append(_blank(text[position:]))
    return "".join(kept).split("\n")


class Identifier(NamedTuple):
    """A name that the source itself gives to something."""

    name: str
    line: int


def python_identifiers(tree: ast.AST) -> Iterator[Identifier]:
    """Names that this source gives: functions, classes, arguments, variables, attributes."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield Identifier(node.name, node.lineno)
            case ast.arg():
                yield Identifier(node.arg, node.lineno)
            case ast.Name(ctx=ast.Store()):
                yield Identifier(node.id, node.lineno)
            case ast.Attribute(ctx=ast.Store()):
                yield Identifier(node.attr, node.lineno)


def c_identifiers(text: str) -> Iterator[Identifier]:
    """All identifiers and keywords in C code."""
    for number, line in enumerate(c_code(text).split("\n"), start=1):
        for match in re.finditer(r"\b[A-Za-z_]\w*", line):
            yield Identifier(match[0], number)
