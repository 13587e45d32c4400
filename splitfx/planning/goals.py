"""What the user has: the most bytes, seconds and multiply-accumulates, each as an amount or as a share of the model's.

``"64 MiB"`` or a number of bytes, ``"20 ms"`` or seconds, ``1e9``; ``"0.5x"`` of any; ``"least"`` for memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from splitfx.errors import PlanError
from splitfx.ground.amounts import parse_bytes, parse_count, parse_seconds, share
from splitfx.ground.table import number, seconds, size
from splitfx.text import shown

Amount = str | int | float | None


@dataclass(frozen=True)
class Goals:
    """The most that is allowed, None where nothing was asked: bytes, seconds, multiply-accumulates. ``least``: as few
    bytes as can be. ``drop``: points of accuracy that may be lost."""

    peak_bytes: int | None = None
    seconds: float | None = None
    macs: int | None = None
    least: bool = False
    drop: float | None = None

    @property
    def words(self) -> str:
        asked = [
            "the least peak" if self.least else "",
            f"a peak of at most {size(self.peak_bytes)}" if self.peak_bytes is not None else "",
            f"at most {seconds(self.seconds)}" if self.seconds is not None else "",
            f"at most {number(self.macs)} MACs" if self.macs is not None else "",
            f"at most {self.drop:g} points of accuracy lost" if self.drop is not None else "",
        ]
        return ", ".join(one for one in asked if one) or "no budget: what can be had"


def goals(peak: Amount, latency: Amount, macs: Amount, drop: float | None, now: tuple[int, float, int]) -> Goals:
    """``now``: bytes, seconds and multiply-accumulates of the model as it is. Raises `PlanError`."""
    least = isinstance(peak, str) and peak.strip() == "least"
    if drop is not None and not 0 <= drop < 100:
        raise PlanError(f"accuracy_drop is in points, 0 or more; got {shown(drop)}")
    return Goals(
        None if least else _bytes(peak, now[0]),
        _amount("latency", latency, now[1], parse_seconds),
        None if macs is None else math.floor(_amount("macs", macs, now[2], parse_count) or 0),
        least,
        drop,
    )


def _bytes(given: Amount, now: int) -> int | None:
    found = _amount("peak", given, now, parse_bytes)
    return None if found is None else math.floor(found)


def _amount(name: str, given: Amount, now: float, read: Callable[[str], float]) -> float | None:
    """An amount, or a share of ``now``."""
    if given is None:
        return None
    if isinstance(given, str):
        part = share(given)
        found = part * now if part is not None else read(given)
    else:
        found = float(given)
    if isinstance(given, bool) or not (math.isfinite(found) and found > 0):
        raise PlanError(f"{name} is more than nothing, as an amount or as a share such as '0.5x'; got {shown(given)}")
    return found
