"""Documents from elsewhere as typed data: every field is there, of its type and of ordinary size, or one line says not.

Refuses: numbers beyond 64 bits or not finite, nesting deeper than `DEEPEST`, fields of other types than the struct's.
Promises: what passes is plain data; no class is looked up by a name in the document.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from splitfx.errors import SplitfxError
from splitfx.ground.files import read_json
from splitfx.text import one_line

DEEPEST = 100  # containers in containers
SHOWN = 200  # characters of a reason

T = TypeVar("T")

Count = Annotated[int, Meta(ge=0)]  # and below 2**63, as every number
Text = Annotated[str, Meta(min_length=1, max_length=4096)]


def read_typed(path: Path, kind: type[T], error: type[SplitfxError], missing: str, advice: str = "") -> T:
    """A JSON file as a ``kind``. Raises ``error`` in one line, with the place in the document."""
    return typed(read_json(path, error, missing), kind, error, str(path), advice)


def typed(given: Any, kind: type[T], error: type[SplitfxError], what: str, advice: str = "") -> T:
    """Decoded JSON as a ``kind``; ``what`` names it. Raises ``error`` in one line, with the place in the document."""
    try:
        require_ordinary(given)
        return msgspec.convert(given, kind)
    except (ValueError, RecursionError) as problem:
        raise error(f"{what} is damaged: {reason(problem)}{advice}") from None


def reason(problem: Exception) -> str:
    """What a decoder says, as a part of a sentence: ``models[0].macs: expected `int`, got `str```."""
    said, _, place = str(problem).rpartition(" - at ")
    said, place = (said, place.strip("`").removeprefix("$.")) if said else (str(problem), "")
    said = one_line(said[:1].lower() + said[1:], SHOWN)
    return f"see {place}: {said}" if place and place != "$" else said


def require_ordinary(given: Any) -> None:
    """Raise `ValueError` for what is no plain JSON, or whose numbers overflow where they are used."""
    level, depth = [given], 0
    while level:
        if depth > DEEPEST:
            raise ValueError(f"it nests more than {DEEPEST} levels deep")
        inside: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                if not all(isinstance(key, str) for key in one):
                    raise ValueError("a key that is no text")
                inside += one.values()
            elif isinstance(one, list | tuple):
                inside += one
            elif isinstance(one, int) and not -(2**63) <= one < 2**63:
                raise ValueError("a number of more than 64 bits")
            elif isinstance(one, float) and not math.isfinite(one):
                raise ValueError("a number that is not finite")
            elif not isinstance(one, int | float | str | None):
                raise ValueError(f"a value of type {type(one).__name__}")
        level, depth = inside, depth + 1
