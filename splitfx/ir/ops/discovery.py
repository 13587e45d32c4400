"""Operators that installed packages register, by an entry point in the group "splitfx.ops"."""

from __future__ import annotations

import functools
import importlib.metadata

from splitfx.errors import SplitfxError

ENTRY_POINTS = "splitfx.ops"


@functools.cache
def discover() -> None:
    """Let installed packages register their operators. Raises `SplitfxError` that names a package that cannot."""
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            point.load()()
        except Exception as error:  # foreign code may raise anything; the user needs to know whose it is
            package = point.dist.name if point.dist else "unknown"
            raise SplitfxError(
                f"entry point '{point.name}' ({point.value}) of the installed package '{package}' cannot register its "
                f"operators: {error}. Repair or uninstall that package."
            ) from error
