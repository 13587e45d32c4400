"""Times of calls against another call's, taken in turn, with how well they are known.

A machine drifts: other work, its clock, its memory. So a call is timed next to the one that it is compared with, in an
order that turns round, and the ratio of the two is what counts. Several calls take turns too, so that each of them is
met by all that happens in the whole time. What still differs between parts of the time is the spread.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from splitfx.errors import UnsupportedError
from splitfx.ground.timing import synchronizer, took

PARTS, STUDENT = 5, 2.776  # of the time, and Student's t for 95 % with as many
SURE = 0.02  # a ratio whose spread is no larger than this share of it is known
LEAST, MOST = 3 * PARTS, 20 * PARTS  # pairs of calls for each ratio; what the most do not make sure, few more would
LEAST_SECONDS, MOST_SECONDS = 1.0, 20.0  # in which something may happen on the machine; and for each ratio
SEEN = 0.01  # what two digits show
WARM_UP = 3  # calls before the first that counts


@dataclass(frozen=True)
class Ratio:
    """Of two times: the middle one of ``pairs`` of calls. ``spread``: half of a 95 % interval, from how far the
    middle ratios of five parts of the time lie from each other (batch means)."""

    middle: float
    spread: float
    pairs: int = 0

    @property
    def same(self) -> bool:
        """Whether 1 is within the spread."""
        return abs(self.middle - 1) <= max(self.spread, SEEN)

    def __str__(self) -> str:
        return "no difference" if self.same else f"x{self.middle:.2f} ± {max(self.spread, SEEN):.2f}"


def ratio(found: list[float]) -> Ratio:
    """The middle of ratios in the order in which they were measured, five or more."""
    share = len(found) / PARTS
    parts = [statistics.median(found[round(i * share) : round((i + 1) * share)]) for i in range(PARTS)]
    return Ratio(statistics.median(found), STUDENT * statistics.stdev(parts) / math.sqrt(PARTS), len(found))


def ratios(
    base: Callable[[], Any],
    others: Mapping[str, Callable[[], Any]],
    device: torch.device | str = "cpu",
    most: float = MOST_SECONDS,
) -> dict[str, Ratio]:
    """The time of each of ``others`` as a ratio to that of ``base``; ends when all are known, or after 100 pairs or
    ``most`` seconds for each of them, but not before five pairs of each and, where calls are short, a second."""
    synchronize = synchronizer(torch.device(device))
    found: dict[str, list[float]] = {name: [] for name in others}
    open_ = list(others)
    with torch.inference_mode():
        for call in (base, *others.values()) * 2:  # the first calls pick kernels and fill caches
            call()
        start = time.perf_counter()
        while open_:
            for name in open_:
                if len(found[name]) % 2:
                    mine, its = took(others[name], synchronize), took(base, synchronize)
                else:
                    its, mine = took(base, synchronize), took(others[name], synchronize)
                found[name].append(mine / its)
            passed = time.perf_counter() - start
            open_ = [name for name in open_ if not _known(found[name], passed, most * len(others))]
    return {name: ratio(times) for name, times in found.items()}


def _known(found: list[float], passed: float, most: float) -> bool:
    if len(found) < PARTS or passed > most:
        return len(found) >= PARTS
    if len(found) < LEAST or passed < LEAST_SECONDS:
        return False
    now = ratio(found)
    return len(found) >= MOST or now.spread <= SURE * now.middle


def alternate(
    functions: Mapping[str, Callable[[], Any]], runs: int = 20, device: str | torch.device = "cpu"
) -> dict[str, float]:
    """Median seconds of each function, called in turn, so that a drift of the machine meets all alike."""
    return {name: statistics.median(times) for name, times in timed(functions, runs, device_of(device)).items()}


def timed(
    functions: Mapping[str, Callable[[], Any]], runs: int, device: torch.device, warm_up: int = WARM_UP
) -> dict[str, list[float]]:
    """Seconds of every run of every function, in rounds; the order turns round from one round to the next."""
    found: dict[str, list[float]] = {name: [] for name in functions}
    synchronize = synchronizer(device)
    with torch.inference_mode():
        for turn in range(-warm_up, runs):
            names = list(functions) if turn % 2 == 0 else list(functions)[::-1]
            for name in names:
                found[name].append(took(functions[name], synchronize))
    return {name: times[warm_up:] for name, times in found.items()}


def device_of(device: str | torch.device) -> torch.device:
    """Raises `UnsupportedError` for one that is not here."""
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise UnsupportedError(f"there is no device {str(device)!r}; use 'cpu' or 'cuda'") from error
    if place.type not in ("cpu", "cuda"):
        raise UnsupportedError(f"measuring on {place.type} is not supported; use 'cpu' or 'cuda'")
    if place.type == "cuda" and not torch.cuda.is_available():
        raise UnsupportedError("there is no CUDA device here (torch.cuda.is_available() is False); use device='cpu'")
    return place
