"""Sweeps over many cases: a sample of them in ``make test``, all of them in ``make slow``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def sampled(cases: Iterable[Any], every: int) -> list[Any]:
    """One case of ``every`` as it is, the others marked slow. Neighbours are alike: the sample has each kind."""
    return [
        one if number % every == 0 else pytest.param(*_arguments(one), marks=pytest.mark.slow)
        for number, one in enumerate(cases)
    ]


def _arguments(case: Any) -> tuple[Any, ...]:
    return case if isinstance(case, tuple) else (case,)
