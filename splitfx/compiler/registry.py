"""Finds passes by name: every module of `splitfx.passes`, and what installed packages offer.

Does: imports each module of the package `splitfx.passes` and takes the passes defined there; no list to keep.
Other packages add theirs by an entry point in the group "splitfx.passes", or at run time with `register`.
Refuses: a pass that breaks the protocol and a name taken twice (`PassError`), an unknown name (`PlanError`).
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import pkgutil
from types import ModuleType
from typing import TypeVar

from splitfx.compiler.protocol import Pass, Promise, check_options
from splitfx.errors import PassError, PlanError, nearest
from splitfx.text import cut

ENTRY_POINTS = "splitfx.passes"

P = TypeVar("P", bound=Pass)

_known: dict[str, type[Pass]] = {}


def get(name: str) -> type[Pass]:
    """The pass of that plan name. Raises `PlanError` with the nearest name when there is none."""
    known = all()
    name = next((one for one, cls in known.items() if name == cls.__name__), name)  # as it is spelled in Python
    if name not in known:
        raise PlanError(f"no pass is named '{cut(name)}'.{nearest(name, known)} Known passes: {', '.join(known)}.")
    return known[name]


def all() -> dict[str, type[Pass]]:
    """Every known pass by plan name, in alphabetical order."""
    _discover()
    return dict(sorted(_known.items()))


def register(cls: type[P]) -> type[P]:
    """Make a pass known by its name; usable as a decorator above `@dataclass(frozen=True)`.

    Raises `PassError` when the class breaks the protocol or another class has the name.
    """
    _check(cls)
    other = _known.get(cls.name, cls)
    if other is not cls and _origin(other) != _origin(cls):  # the same address again: a module that was reloaded
        raise PassError(f"two passes are named '{cls.name}': {_origin(other)} and {_origin(cls)}; rename one.")
    _known[cls.name] = cls
    return cls


@functools.cache
def _discover() -> None:
    package = importlib.import_module("splitfx.passes")
    for found in pkgutil.iter_modules(package.__path__, "splitfx.passes."):
        for cls in defined_in(importlib.import_module(found.name)):
            register(cls)
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        register(_load(point))


def defined_in(module: ModuleType) -> list[type[Pass]]:
    """The passes that a module defines itself, not those it imports: subclasses of `Pass` with a name."""
    classes = [one for _, one in inspect.getmembers(module, inspect.isclass) if issubclass(one, Pass)]
    inside = module.__name__ + "."
    return [one for one in classes if "name" in vars(one) and f"{one.__module__}.".startswith(inside)]


def _load(point: importlib.metadata.EntryPoint) -> type[Pass]:
    source = f"entry point '{point.name}' ({point.value}) of the installed package '{_distribution(point)}'"
    try:
        cls = point.load()
    except Exception as error:  # foreign code may raise anything; the user needs to know whose it is
        raise PassError(f"{source} cannot be loaded: {error}. Repair or uninstall that package.") from error
    if not (inspect.isclass(cls) and issubclass(cls, Pass)):
        raise PassError(f"{source} is not a subclass of splitfx.compiler.protocol.Pass.")
    return cls


def _distribution(point: importlib.metadata.EntryPoint) -> str:
    return point.dist.name if point.dist else "unknown"


def _origin(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _check(cls: type[Pass]) -> None:
    if not isinstance(getattr(cls, "name", None), str) or not isinstance(getattr(cls, "promise", None), Promise):
        raise PassError(f"{_origin(cls)} must set `name` (a text) and `promise` (a Promise).")
    if cls.run is Pass.run:
        raise PassError(f"{_origin(cls)} must define `run(graph, facts)`.")
    if "__dataclass_params__" not in vars(cls):  # inherited ones do not count: its own fields would be lost
        raise PassError(f"{_origin(cls)} must be decorated with @dataclass(frozen=True).")
    check_options(cls)
