"""The errors of splitfx: one root, one class per thing that can go wrong.

Every message is one line in the user's words: which layer, plan or file, what was found, what to do next. Whatever a
file or a model puts into it, it is printable and of bounded length (`splitfx.text`).
Catching `SplitfxError` catches everything that splitfx raises on purpose; anything else is a bug in splitfx.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from splitfx.text import one_line

_WORD = 100  # characters; what is longer is no misspelt name
_BEGUN = 3  # characters from which on a name is begun


class SplitfxError(Exception):
    """Root of every error that splitfx raises on purpose."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(one_line(one) if isinstance(one, str) else one for one in args))


class TraceError(SplitfxError):
    """A model cannot be turned into the canonical graph; names the user's module and source line."""


class PlanError(SplitfxError, ValueError):
    """A plan, or an option of a pass, is wrong: unknown name, wrong type, newer format, unreadable file."""


class UnsupportedError(SplitfxError):
    """The request is understood, but splitfx cannot do it for this model, device or dtype."""


class PassError(SplitfxError):
    """A pass failed at its whole job, or breaks the protocol of passes."""


class VerificationError(SplitfxError):
    """The oracle of a pass's promise disagrees with what the pass produced."""


class ExportError(SplitfxError):
    """A graph cannot be written as ONNX, or the written file is not what was asked for."""


class TrainingError(SplitfxError):
    """A training run or a search cannot go on: data, a loss that is not finite, a checkpoint, a full disk."""


class MissingExtraError(SplitfxError, ImportError):
    """An optional package is not installed; the message names the extra that brings it."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the name in `known` closest to `word`, or the one that begins with it; "" when
    there is none.

    The leading space lets a caller append the result to a finished sentence.
    """
    if len(word) > _WORD:
        return ""
    by_folded = {name.casefold(): name for name in known}
    close = difflib.get_close_matches(word.casefold(), by_folded, n=1, cutoff=0.6)
    begun = [name for name in by_folded if len(word) >= _BEGUN and name.startswith(word.casefold())]
    close = close or (begun if len(begun) == 1 else [])
    return f" Did you mean '{by_folded[close[0]]}'?" if close else ""
