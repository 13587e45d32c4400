"""Edits of plain data, for the fuzzers of files: fields by values of other types, and of the structure at random."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fuzz import marker

Place = tuple[Any, Any]  # a container, and a key or index in it


def edited(plain: Any, rng: random.Random, folder: Path, count: int = 2) -> Any:
    """A copy of ``plain`` with one to ``count`` edits; payloads create the marker of ``folder`` when they run."""
    found = copy.deepcopy(plain)
    for _ in range(rng.randint(1, count)):
        places = list(_places(found))
        if places:
            rng.choice(EDITS)(found, places, rng, folder)
    return found


def values(rng: random.Random, folder: Path) -> list[Any]:
    """Values of all types that a file may have anywhere, among them such as break what reads them carelessly."""
    payload = f"__import__('pathlib').Path({str(marker(folder))!r}).touch()"
    return [
        None, True, False, 0, 1, -1, 2, 7, 2**31, 2**40, 2**63 - 1, -(2**63), 2**64, 10**30, 0.0, 0.5, -1.5, 1e300,
        "", "x", "class", "self", "__class__", "forward", "a b", "a'", "../x", "/etc/hostname", "\x1b[31m", "y" * 5000,
        payload, f"y': {payload} or y, 'z", f"x)\n{payload}\n(", f"x = {payload}", [], [[]], [0], [1, 2], ["x"],
        {}, {"x": 1}, {"node": "x"}, {"tuple": []}, {"dict": []}, {"dtype": "float64"}, {"float": "nan"},
        {"float": "inf"}, {"complex": [0, 1]}, {"slice": [None, None, None]}, [rng.randint(-5, 300) for _ in range(3)],
        rng.randint(-3, 40),
        _nested(rng.choice((20, 200))), "aten.relu.default", "aten.sigmoid.default", "operator.mul",
        "aten.set_.default", "aten._reshape_alias.default", "aten.as_strided.default", "aten.empty.memory_format",
        "torch.os.system",
    ]  # fmt: skip


def _nested(depth: int) -> Any:
    found: Any = 0
    for _ in range(depth):
        found = [found]
    return found


def _places(plain: Any) -> list[Place]:
    found: list[Place] = []
    waiting = [plain]
    while waiting:
        one = waiting.pop()
        keys = list(one) if isinstance(one, dict) else range(len(one)) if isinstance(one, list) else ()
        for key in keys:
            found.append((one, key))
            waiting.append(one[key])
    return found


def _replace(plain: Any, places: list[Place], rng: random.Random, folder: Path) -> None:
    held, key = rng.choice(places)
    held[key] = rng.choice(values(rng, folder))


def _nudge(plain: Any, places: list[Place], rng: random.Random, folder: Path) -> None:
    numbers = [(held, key) for held, key in places if type(held[key]) is int]
    if numbers:
        held, key = rng.choice(numbers)
        held[key] = rng.choice((held[key] + 1, held[key] - 1, 2 * held[key], -held[key], held[key] + 2**32))


def _drop(plain: Any, places: list[Place], rng: random.Random, folder: Path) -> None:
    held, key = rng.choice(places)
    del held[key]


def _rename(plain: Any, places: list[Place], rng: random.Random, folder: Path) -> None:
    named = [(held, key) for held, key in places if isinstance(held, dict)]
    held, key = rng.choice(named)
    words = [one for one in values(rng, folder) if isinstance(one, str)]
    held[rng.choice(words)] = held.pop(key)


def _copy(plain: Any, places: list[Place], rng: random.Random, folder: Path) -> None:
    """Put what stands at one place at another, or once more beside itself."""
    held, key = rng.choice(places)
    taken = copy.deepcopy(held[key])
    if isinstance(held, list) and rng.random() < 0.5:
        held.insert(rng.randrange(len(held) + 1), taken)
        return
    other, where = rng.choice(places)
    other[where] = taken


def _shuffle(plain: Any, places: list[Place], rng: random.Random, folder: Path) -> None:
    lists = [held[key] for held, key in places if isinstance(held[key], list) and len(held[key]) > 1]
    if lists:
        rng.shuffle(rng.choice(lists))


EDITS: tuple[Callable[[Any, list[Place], random.Random, Path], None], ...] = (
    _replace, _replace, _replace, _nudge, _nudge, _drop, _rename, _copy, _shuffle
)  # fmt: skip
