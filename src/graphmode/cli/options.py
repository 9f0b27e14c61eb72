"""What the commands share: options generated from dataclasses, how options are written, errors in one line."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from graphmode.engine import aliases
from graphmode.engine.config import EngineOptions
from graphmode.engine.option_text import Kind, TextOption, text_options
from graphmode.errors import GraphModeError, InputError

ENGINE = text_options(EngineOptions, aliases.ENGINE)
# What vLLM's command line calls them too.
_SHORT = {
    "data_parallel_size": "-dp",
    "optimization_level": "-O",
    "pipeline_parallel_size": "-pp",
    "quantization": "-q",
    "tensor_parallel_size": "-tp",
}


def takes(panel: str, destination: str, options: Mapping[str, TextOption], **defaults: Any) -> Callable[..., Any]:
    """Give a command an option for each of ``options``, in a panel of its own in the help text.

    Those that are given reach the command's parameter ``destination``, as a dict of values by name. Options without
    help are hidden. Where the command has a parameter of the same name, the option's is ``<destination>_<name>``.

    Args:
        panel: the panel's title.
        destination: the name of the parameter.
        options: by name.
        **defaults: what the help text names as defaults in place of the options' own.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        own = inspect.signature(command, eval_str=True).parameters
        fields = {f"{destination}_{name}" if name in own else name: option for name, option in options.items()}

        @wraps(command)
        def wrapper(**given: Any) -> Any:
            read = {
                option.name: _read(option, value)
                for field, option in fields.items()
                if (value := given.pop(field)) is not None and value != []
            }
            return command(**given, **{destination: read})

        parameters = [each for name, each in own.items() if name != destination]
        parameters += [_parameter(field, option, panel, defaults) for field, option in fields.items()]
        wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {each.name: each.annotation for each in parameters}
        return wrapper

    return decorate


def _parameter(field: str, option: TextOption, panel: str, defaults: Mapping[str, Any]) -> inspect.Parameter:
    name = f"--{field.replace('_', '-')}"
    names = [name, *filter(None, [_SHORT.get(option.name)])]
    metavar: str | None = str(option.kind)
    kind: Any = str | None
    note = ""
    default = defaults.get(option.name, option.default)
    if option.kind is Kind.FLAG:
        names, metavar, kind = [f"{name}/--no-{name.removeprefix('--')}"], None, bool | None
    elif option.kind is Kind.TEXTS:
        metavar, kind, note = str(Kind.TEXT), list[str] | None, " May be given several times."
    elif default is not None and default != ():
        note = f" Default: {default}."
    declared = typer.Option(
        *names,
        help=option.help + note,
        metavar=metavar,
        show_default=False,
        hidden=not option.help,
        rich_help_panel=panel,
    )
    return inspect.Parameter(field, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, declared])


def _read(option: TextOption, value: Any) -> Any:
    return option.read(value) if isinstance(value, str) else value


class Command(TyperCommand):
    """A command whose options may be written with underscores, and whose flags may have a value.

    ``--max_tokens`` is ``--max-tokens``; ``--enable-graph=false`` is ``--no-enable-graph``.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments of a command line."""
        return super().parse_args(ctx, list(self._as_declared(args)))

    def _as_declared(self, args: Sequence[str]) -> Iterator[str]:
        """Yield the arguments, each option as it was declared; values of options stay what they are."""
        opposites: dict[str, str] = {}
        take_values: set[str] = set()
        for option in self.params:
            if not getattr(option, "is_flag", False):
                take_values |= set(option.opts)
                continue
            opposites |= dict.fromkeys(option.opts, next(iter(option.secondary_opts), ""))
            opposites |= dict.fromkeys(option.secondary_opts, option.opts[0])
        remaining = iter(args)
        for arg in remaining:
            name, equals, value = arg.partition("=")
            if name.startswith("--"):
                name = name.replace("_", "-")
            if arg == "--":
                yield from (arg, *remaining)
            elif equals and name in opposites:
                on = TextOption(name, Kind.FLAG).read(value)
                if not isinstance(on, bool):
                    raise typer.BadParameter(f"{name} is {value!r}; write {name}=true or {name}=false")
                yield from filter(None, (name if on else opposites[name],))
            else:
                yield f"{name}{equals}{value}"
                if not equals and name in take_values:
                    yield from islice(remaining, 1)


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """End the command with status 1 and one line that says why, when graphmode refuses something."""
    try:
        yield
    except GraphModeError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


def write(file: Path, text: str) -> None:
    """Write a text to a file.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{file} cannot be written: {error.strerror}; name another file") from error
