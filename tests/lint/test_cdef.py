"""What Python is told about the C core is what the C core says."""

from __future__ import annotations

import re

from tests.helpers.sources import CSRC, c_without_comments


def normalised(text):
    text = re.sub(r"^[ \t]*#.*?(?<!\\)$", "", c_without_comments(text), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"\s+", " ", text)
    return re.sub(r" ?([(),;*]) ?", r"\1", text)


def declared_functions(text):
    """Prototypes in a header, whitespace normalised, without the semicolon."""
    without_bodies = re.sub(r"\{[^{}]*\}", "{}", normalised(text))
    for statement in without_bodies.split(";"):
        statement = statement.strip()
        if "(" in statement and not statement.startswith(("typedef", "struct", "enum", "union")):
            yield statement


def test_every_function_for_python_is_declared_so_in_the_header():
    header = normalised((CSRC / "shmr.h").read_text())
    functions = list(declared_functions((CSRC / "shmr_cdef.h").read_text()))
    assert functions
    assert not [function for function in functions if function + ";" not in header]


def test_declared_functions_reads_prototypes():
    text = """
    typedef struct { int (*f)(int); ...; } shmr_x;
    #define A ...
    int shmr_f(const void *p,   /* why */
               int   n);
    """
    assert list(declared_functions(text)) == ["int shmr_f(const void*p,int n)"]
    assert "int shmr_f(const void*p,int n);" in normalised("int shmr_f(const void * p, int n);")
