"""What Python is told about the C core is what the C core says."""

from __future__ import annotations

import ast
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


# --- the types that mypy sees ----------------------------------------------------------------------


def kinds_in_c(text):
    """{function: for each argument, and what it returns, whether it is a number}."""
    found = {}
    for function in declared_functions(text):
        returned, name, arguments = re.fullmatch(r"(.*?)(\w+)\((.*)\)", function).groups()
        kinds = (
            [] if arguments in ("", "void") else ["*" not in argument for argument in arguments.split(",")]
        )
        found[name] = [*kinds, "*" not in returned and returned.strip() != "void"]
    return found


def kinds_in_stub(text):
    """The same of the class ``Lib`` in a stub."""
    (library,) = (
        node for node in ast.parse(text).body if isinstance(node, ast.ClassDef) and node.name == "Lib"
    )
    return {
        node.name: [
            ast.unparse(part) == "int"
            for part in [*(a.annotation for a in node.args.posonlyargs[1:]), node.returns]
        ]
        for node in library.body
        if isinstance(node, ast.FunctionDef)
    }


def fields_in_c(text):
    """{struct: its fields} of the declarations."""
    return {
        "".join(word.capitalize() for word in name.split("_")): re.findall(
            r"(\w+)(?:\[\w+\])?(?=[,;])", normalised(body)
        )
        for body, name in re.findall(r"typedef struct \{(.*?)\} (\w+);", c_without_comments(text), re.DOTALL)
    }


def fields_in_stub(text):
    return {
        node.name: [line.target.id for line in node.body if isinstance(line, ast.AnnAssign)]
        for node in ast.parse(text).body
        if isinstance(node, ast.ClassDef) and node.name.startswith("Shmr")
    }


def test_the_stub_has_every_function_and_field():
    declarations = (CSRC / "shmr_cdef.h").read_text()
    stub = (CSRC.parent / "shmengine" / "_native" / "_core.pyi").read_text()
    assert kinds_in_stub(stub) == kinds_in_c(declarations)
    found = {name: fields for name, fields in fields_in_stub(stub).items() if fields}
    assert found == fields_in_c(declarations)


def test_kinds_are_read():
    text = "int shmr_f(const void *p, uint64_t n); void shmr_g(void);"
    assert kinds_in_c(text) == {"shmr_f": [False, True, True], "shmr_g": [False]}
    stub = "class Lib:\n    def shmr_f(self, p: CData, n: int, /) -> int: ...\n    def shmr_g(self) -> None: ...\n"
    assert kinds_in_stub(stub) == kinds_in_c(text)
