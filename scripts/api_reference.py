"""Write docs/api.md from the docstrings of graphmode. With --check, only fail if it is out of date.

What is public is what ``__all__`` of the packages below names, and the classes and types that these lead to.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import griffe

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "api.md"
PACKAGES = ("graphmode.graph", "graphmode")
ERRORS = ("graphmode.errors",)  # docstrings name them without an import
INTRODUCTION = """# API reference

Every public name, from its docstring. `make docs` writes this page; the [guide](guide.md) says how things are used.
"""


def load() -> griffe.Module:
    """Return graphmode as griffe reads it, without importing it."""
    options = {"warnings": False, "returns_named_value": False}
    loader = griffe.GriffeLoader(search_paths=[ROOT / "src"], docstring_parser="google", docstring_options=options)
    package = loader.load("graphmode")
    loader.resolve_aliases()
    return package  # type: ignore[return-value]


def exported(package: griffe.Module, path: str) -> dict[str, griffe.Object]:
    """Return what ``__all__`` of a package names, by those names."""
    module = package.modules_collection[path]
    return {name: _target(module[name]) for name in sorted(map(str, module.exports), key=str.lower)}


def public(package: griffe.Module) -> dict[str, dict[str, griffe.Object]]:
    """Return the public objects of each package, by name; last what users reach from those."""
    found = {path: exported(package, path) for path in PACKAGES}
    seen = {target.path for names in found.values() for target in names.values()}
    queue = [target for names in found.values() for target in names.values()]
    reached: dict[str, griffe.Object] = {}
    while queue:
        for target in _named_by(queue.pop()):
            if target.path not in seen and (target.is_class or _is_alias_of_types(target)):
                seen.add(target.path)
                queue.append(target)
                reached[target.name] = target
    return {**found, "What these lead to": dict(sorted(reached.items(), key=lambda item: item[0].lower()))}


def members(owner: griffe.Object) -> list[griffe.Object]:
    """Return the public methods and properties of a class, in the order of its code."""
    if not owner.is_class:
        return []
    found = [
        _target(member) for name, member in owner.members.items() if name == "__call__" or not name.startswith("_")
    ]
    return [member for member in found if member.is_function or "property" in member.labels]


def _target(found: griffe.Object | griffe.Alias) -> griffe.Object:
    return found.final_target if found.is_alias else found  # type: ignore[union-attr,return-value]


def _named_by(owner: griffe.Object) -> Iterator[griffe.Object]:
    """Yield the objects of graphmode that annotations and docstrings of ``owner`` and its members name."""
    for part in (owner, *owner.members.values()):
        if part.is_alias or (
            part is not owner and part.name.startswith("_") and part.name not in ("__init__", "__call__")
        ):
            continue
        given = [getattr(part, "annotation", None), getattr(part, "returns", None)]
        given += [parameter.annotation for parameter in getattr(part, "parameters", ())]
        if part is owner and part.is_attribute:
            given.append(part.value)  # what a type stands for
        paths = {name.canonical_path for each in given if isinstance(each, griffe.Expr) for name in _names(each)}
        if part.docstring is not None:
            paths |= set(re.findall(r"`~?(graphmode[\w.]+)`", part.docstring.value))
            raised = [
                each for section in part.docstring.parsed if section.kind.value == "raises" for each in section.value
            ]
            paths |= {f"{home}.{name.name}" for each in raised for name in _names(each.annotation) for home in ERRORS}
        for path in sorted(path for path in paths if path.startswith("graphmode.")):
            with suppress(KeyError):  # an argument of the same function, or an error of another module
                yield _target(owner.modules_collection[path])


def _is_alias_of_types(target: griffe.Object) -> bool:
    return target.is_attribute and not str(target.value).startswith(("TypeVar", "ParamSpec"))


def _names(expression: object) -> Iterator[griffe.ExprName]:
    if isinstance(expression, griffe.ExprName):
        yield expression
    elif isinstance(expression, griffe.Expr):
        for part in expression.iterate(flat=True):
            if isinstance(part, griffe.ExprName):
                yield part


def render(package: griffe.Module) -> str:
    """Return the page."""
    lines = [INTRODUCTION]
    for path, names in public(package).items():
        is_module = path in PACKAGES
        lines.append(f"## {f'`{path}`' if is_module else path}\n")
        if is_module:
            lines.append(_prose(package.modules_collection[path].docstring.value))
        for name, target in names.items():
            lines += [f"### `{name}`\n", *_described(target, name)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def _described(target: griffe.Object, name: str) -> Iterator[str]:
    if target.is_attribute:
        yield f"```python\n{name}{f': {target.annotation}' if target.annotation else ''}{_value(target)}\n```\n"
    elif not _is_enum(target):
        yield f"```python\n{_signature(target, name)}\n```\n"
    if target.is_class and not _is_enum(target) and (bases := [str(base) for base in target.bases]):
        yield f"Bases: {', '.join(f'`{base}`' for base in bases)}\n"
    if target.docstring is not None:
        yield from _docstring(target.docstring)
    for member in target.members.values() if target.is_class else ():
        if not member.is_alias and member.is_attribute and "property" not in member.labels:
            says = f": {_one_line(member.docstring.value)}" if member.docstring is not None else ""
            if says or _is_enum(target):
                yield f"- `{member.name}`{says}"
    yield ""
    for member in members(target):
        yield f"#### `{name}.{member.name}`\n"
        yield from _described(member, member.name)


def _is_enum(target: griffe.Object) -> bool:
    return target.is_class and any("Enum" in str(base) for base in target.bases)


def _value(attribute: griffe.Object) -> str:
    return f" = {attribute.value}" if attribute.value is not None else ""


def _signature(target: griffe.Object, name: str) -> str:
    if "property" in target.labels or target.is_attribute:
        return f"{name}: {target.annotation}"
    if target.is_class and "Protocol" in map(str, target.bases):
        return f"class {name}"
    parameters, marks = [], {"keyword": False}
    for parameter in target.parameters:
        kind = parameter.kind
        if parameter.name in ("self", "cls"):
            continue
        if kind is griffe.ParameterKind.var_positional:
            marks["keyword"] = True
        if kind is griffe.ParameterKind.keyword_only and not marks["keyword"]:
            marks["keyword"] = True
            parameters.append("*")
        stars = {griffe.ParameterKind.var_positional: "*", griffe.ParameterKind.var_keyword: "**"}.get(kind, "")
        default = "" if stars or parameter.default is None else f" = {parameter.default}"
        parameters.append(f"{stars}{parameter.name}: {parameter.annotation}{default}")
    returns = f" -> {target.returns}" if target.is_function and target.returns else ""
    if target.is_class and not parameters:
        return f"class {name}"
    line = f"{name}({', '.join(parameters)}){returns}"
    if len(line) <= 100:
        return line
    return f"{name}(\n" + "".join(f"    {parameter},\n" for parameter in parameters) + f"){returns}"


def _docstring(docstring: griffe.Docstring) -> Iterator[str]:
    for section in docstring.parsed:
        match section.kind.value:
            case "text":
                yield _prose(section.value)
            case "parameters" | "attributes":
                for item in section.value:
                    yield f"- `{item.name}`: {_one_line(item.description)}"
                yield ""
            case "returns" | "yields":
                words = " ".join(_one_line(item.description) for item in section.value)
                yield f"{section.kind.value.capitalize()}: {words}\n"
            case "raises":
                yield "Raises:\n"
                for item in section.value:
                    yield f"- `{str(item.annotation).strip('()')}`: {_one_line(item.description)}"
                yield ""
            case other:
                raise ValueError(f"{docstring.parent.path}: a section of the kind {other}, which is not rendered")


def _one_line(text: str) -> str:
    return _inline(" ".join(text.split()))


def _inline(text: str) -> str:
    """Turn the marks of docstrings into those of Markdown."""
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", text)
    return text.replace("``", "`")


def _prose(text: str) -> str:
    """Return paragraphs, and indented code after a double colon as a block."""
    blocks = re.split(r"(::\n\n(?:(?:    .*)?\n?)+)", text + "\n")
    parts = []
    for block in blocks:
        if block.startswith("::\n\n    "):
            code = "\n".join(line.removeprefix("    ") for line in block.removeprefix("::\n\n").rstrip().splitlines())
            parts.append(f":\n\n```python\n{code}\n```\n\n")
        else:
            parts.append(_inline(block))
    return "".join(parts).strip() + "\n"


def main() -> None:
    """Write the page, or check it."""
    page = render(load())
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page)
    elif not PAGE.is_file() or PAGE.read_text() != page:
        sys.exit("docs/api.md is not what the docstrings say; run: make docs")


if __name__ == "__main__":
    main()
