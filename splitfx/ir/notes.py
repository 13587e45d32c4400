"""Notes: what a pass, or the tracer, did or declined at one place in the user's model, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Note:
    """What a pass did, or declined to do and why, at one place in the user's model."""

    where: str  # the user's layer path
    what: str
    kind: Literal["did", "declined", "info"] = "did"
