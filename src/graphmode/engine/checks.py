"""Checks of what users give: types like ranges, before any work starts.

Each returns the value in its plain type, or raises an InputError with the value and what is allowed. A bool is no
number here, numpy's integers and floats count as Python's, and a number is finite in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from numbers import Integral, Real
from reprlib import Repr
from typing import Any

import numpy as np
import torch

from graphmode.errors import InputError

LARGEST = 2**31 - 1
"""The largest count that is taken: those on the device have 32 bits."""

_FLOAT32_MAX = float(np.finfo(np.float32).max)
_short = Repr()
_short.maxstring = _short.maxother = 80


def shown(value: object) -> str:
    """Return a value for a message: short, whatever it is."""
    return _short.repr(value)


def unfit(name: str, value: object, allowed: str) -> InputError:
    """Return the error for a value that is not what is allowed."""
    return InputError(f"{name} is {shown(value)}; it must be {allowed}")


def integer(name: str, value: object, *, least: int | None = None, most: int | None = None, also: str = "") -> int:
    """Return an integer from ``least`` to ``most``.

    Args:
        name: of the value, for the message.
        value: what was given.
        least: the smallest that is allowed.
        most: the largest that is allowed.
        also: what the message says after the range, for example ``", or None"``.

    Raises:
        InputError: it is something else.
    """
    if is_integer(value):
        number = int(value)  # type: ignore[call-overload]
        if (least is None or number >= least) and (most is None or number <= most):
            return int(number)
    raise unfit(name, value, f"an integer{_range(least, most)}{also}")


def number(
    name: str,
    value: object,
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    also: str = "",
) -> float:
    """Return a finite number from ``least`` to ``most``, or more than ``above``; arguments as of :func:`integer`."""
    if not isinstance(value, bool) and isinstance(value, Real):  # numpy's floats are registered as Real
        try:
            given = float(value)
        except OverflowError:
            given = math.inf
        # What is too small for float32 is 0 on the device.
        if (
            abs(given) <= _FLOAT32_MAX
            and (least is None or given >= least)
            and (most is None or given <= most)
            and (above is None or float(np.float32(given)) > above)
        ):
            return given
    limits = _range(least, most) if above is None else f" above {above}" + ("" if most is None else f", {most} at most")
    raise unfit(name, value, f"a finite number{limits}{also}")


def flag(name: str, value: object, *, also: str = "") -> bool:
    """Return True or False; anything else is an InputError."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    raise unfit(name, value, f"True or False{also}")


def choice(name: str, value: object, choices: Collection[str], *, also: str = "") -> str:
    """Return one of the texts in ``choices``; anything else is an InputError."""
    if isinstance(value, str) and value in choices:
        return value
    raise unfit(name, value, f"one of {', '.join(choices)}{also}")


def text(name: str, value: object) -> str:
    """Return a text that can be encoded; anything else is an InputError."""
    if not isinstance(value, str):
        raise unfit(name, value, "a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{name} holds {value[error.start]!r} at character {error.start}, half of a surrogate pair, which no UTF-8 "
            "text has; decode the text anew, or replace it"
        ) from None
    return value


def texts(name: str, value: object, *, also: str = "") -> tuple[str, ...]:
    """Return texts that are not empty: one, or a list of them; anything else is an InputError."""
    given = [value] if isinstance(value, str) else _listed(value)
    if given is None:
        raise unfit(name, value, f"a text or a list of texts{also}")
    if any(not isinstance(each, str) or not each for each in given):
        raise unfit(name, value, f"a list of texts that are not empty{also}")
    return tuple(text(name, each) for each in given)


def token_ids(name: str, value: object, *, also: str = "") -> list[int]:
    """Return token ids: 0 or more, from a list, a set, a range, or a tensor of one dimension.

    Whether the model has them is another question.

    Raises:
        InputError: it is something else.
    """
    ids = None if isinstance(value, str) else _listed(value)
    if ids is None:
        raise unfit(name, value, f"a list of token ids{also}")
    # The types of a long prompt are few, and its ids are looked at where the vocabulary is known.
    if set(map(type, ids)) - {int}:
        for each in ids:
            if not is_integer(each):
                raise InputError(f"{name} holds {shown(each)}; it must be a list of token ids, integers{also}")
        ids = [int(each) for each in ids]
    if ids and min(ids) < 0:
        raise InputError(f"{name} holds {min(ids)}; token ids are 0 or more")
    return ids


def settle(
    options: object, check: Callable[..., Any], *names: str, optional: bool = False, also: str = "", **limits: Any
) -> None:
    """Check fields of a frozen dataclass that is being made, and keep what the check returns.

    Args:
        options: the dataclass.
        check: one of the functions above.
        *names: of the fields.
        optional: whether None is allowed too.
        also: as of :func:`integer`.
        **limits: for the check.
    """
    if optional:
        also += ", or None"
    limits |= {"also": also} if also else {}
    for name in names:
        value = getattr(options, name)
        if not optional or value is not None:
            object.__setattr__(options, name, check(name, value, **limits))


def is_integer(value: object) -> bool:
    """Return whether a value counts as an integer: numpy's do, a bool does not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _listed(value: object) -> list[Any] | None:
    """Return what a collection holds; None where it is no list, set or tensor of one dimension."""
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return value.tolist() if value.ndim == 1 else None
    if not isinstance(value, Collection) or isinstance(value, (Mapping, str, bytes, bytearray)):
        return None
    return list(value)


def _range(least: float | None, most: float | None) -> str:
    if most is None or most == LARGEST:
        return "" if least is None else f" of at least {least}"
    return f" of at most {most}" if least is None else f" from {least} to {most}"
