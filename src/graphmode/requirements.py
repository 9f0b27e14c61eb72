"""Whether what is installed lies within the versions that graphmode is tested with: those of its package metadata.

Only requirements with an upper bound count: those of packages whose internals graphmode uses.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from packaging.version import Version


def outside_of_tested(
    declared: Iterable[str], installed: Callable[[str], str] = version
) -> tuple[list[str], list[str]]:
    """Compare versions with what is declared.

    Args:
        declared: requirements as in a package's metadata.
        installed: gives a package's version, or raises ``PackageNotFoundError``.

    Returns:
        A line for each package that is older than the oldest tested, and one for each that is newer than the newest.
    """
    older, newer = [], []
    for requirement in map(Requirement, declared):
        bounds = {each.operator: each.version for each in requirement.specifier}
        if requirement.marker is not None or not {">=", "<"} <= bounds.keys():
            continue
        try:
            found = installed(requirement.name)
        except PackageNotFoundError:
            continue
        remedy = f"pip install '{requirement.name}>={bounds['>=']},<{bounds['<']}'"
        if Version(found) < Version(bounds[">="]):
            older.append(f"{requirement.name} {found} is older than graphmode needs; run: {remedy}")
        elif not requirement.specifier.contains(found, prereleases=True):
            newer.append(
                f"{requirement.name} {found} is newer than graphmode is tested with; if something fails, run: {remedy}"
            )
    return older, newer


@cache
def _problems() -> tuple[list[str], list[str]]:
    return outside_of_tested(requires("graphmode") or ())


def warn_of_untested_versions() -> None:
    """Log a line for each package that is newer than what graphmode is tested with."""
    for line in _problems()[1]:
        logging.getLogger("graphmode").warning(line)


def too_old() -> str:
    """Return which packages are too old and what to do, in one line; empty if none is."""
    return "; ".join(_problems()[0])
