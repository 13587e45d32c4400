"""Amounts as people write them: ``"64 MiB"``, ``"20 ms"``, ``"1.5 G"``, and ``"0.5x"`` or ``"50%"`` of what there is.

All raise `PlanError` for text that says no such amount, but `share`, which gives None.
"""

from __future__ import annotations

import re

from splitfx.errors import PlanError
from splitfx.ground import limits
from splitfx.text import shown

_BYTES = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}
_COUNTS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


def parse_bytes(text: str) -> int:
    """``"64 MiB"`` -> 67108864."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKmMgG]?i?[bB])\s*", text)
    if found is None or found[2].lower() not in _BYTES:
        raise PlanError(
            f"a budget is bytes with their unit, such as '64 MiB', or a share such as '0.5x'; got {shown(text)}"
        )
    value = float(found[1]) * _BYTES[found[2].lower()]
    if value > limits.BUDGET_BYTES:
        raise PlanError(f"a budget is at most 1024 PiB; got {shown(text)}")
    if int(value) <= 0:
        raise PlanError(f"a budget must be more than 0 bytes; got {shown(text)}")
    return int(value)


def bytes_text(count: int) -> str:
    """The text for which `parse_bytes` gives ``count``: ``"14 MiB"``, or ``"14680065 B"`` where no short one does."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale and 4 * count % scale == 0:
            return f"{count / scale:.2f}".rstrip("0").rstrip(".") + f" {unit}"
    return f"{count} B"


def parse_seconds(text: str) -> float:
    """``"20 ms"`` -> 0.02."""
    found = re.fullmatch(r"\s*(\d*\.?\d+)\s*(s|ms|us|µs)\s*", text)
    if found is None:
        raise PlanError(f"a latency is a time such as '20 ms', or a share such as '0.8x'; got {shown(text)}")
    return float(found[1]) * _SECONDS[found[2]]


def parse_count(text: str) -> float:
    """``"1.5 G"`` -> 1.5e9."""
    found = re.fullmatch(r"\s*(\d*\.?\d+(?:e\d+)?)\s*([kMGT]?)\s*", text)
    if found is None:
        raise PlanError(f"macs is a count such as '1.5 G', or a share such as '0.5x'; got {shown(text)}")
    return float(found[1]) * _COUNTS[found[2]]


def share(text: str) -> float | None:
    """A budget as a share of what there is: 0.5 for ``0.5x`` or ``50%``; None for what is written in another way."""
    found = re.fullmatch(r"\s*(\d*\.?\d+)\s*([x×%])\s*", text)
    return float(found[1]) / (100 if found[2] == "%" else 1) if found is not None else None
