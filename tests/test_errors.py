"""Errors have one home, below everything that raises them."""

import ast
import inspect
from pathlib import Path

import graphmode.errors

SOURCE = Path(graphmode.errors.__file__).parent
ERRORS = {name for name, _ in inspect.getmembers(graphmode.errors, inspect.isclass)}


def test_every_error_is_in_errors_and_derives_from_one() -> None:
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef) and file.name != "errors.py":
                bases = {ast.unparse(base).rpartition(".")[2] for base in node.bases}
                assert not {base for base in bases if base.endswith(("Error", "Exception"))}, f"{file}: {node.name}"
    for name in ERRORS:
        assert issubclass(getattr(graphmode.errors, name), graphmode.errors.GraphModeError)


def test_nobody_asks_the_runtime_for_an_error() -> None:
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("graphmode.graph"):
                assert not {each.name for each in node.names} & ERRORS, file
