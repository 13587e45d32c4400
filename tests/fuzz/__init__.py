"""Fuzzers and laws: many draws of one kind of input, each watched for what must never happen.

``python -m tests.fuzz [--draws 2000] [--kind NAME ...] [--seed N] [--jobs 2] [--table]``; ``make fuzz`` runs all kinds,
`test_sample` a few draws of each in ``make test``.

A kind is a module ``tests/fuzz/kind_NAME.py``; it is discovered, nothing lists it. The first line of its docstring is
its row in the table of docs/fuzz.md. It has

``draw(seed: int, folder: pathlib.Path) -> str``
    Make one input from ``random.Random(seed)`` (nothing else may decide: the seed repeats the draw), give it to
    splitfx, check what came out, and return one word for the tally, such as ``equal`` or ``accepted``. ``folder`` is
    empty and the only place that may be written to. A `SplitfxError` that leaves ``draw`` counts as ``refused``; a kind
    for which a refusal is wrong catches it and raises another. Everything else that is raised is a fault.
``prepare() -> None``
    Optional: what all draws share (templates; keep them with `functools.cache`). Once a process, off the clock.
``SAMPLE``
    Optional: draws in ``make test``, 60 unless said. They should take a few seconds together.

Counted as faults, with the seed that repeats them: a process that dies by a signal, a draw that takes more than 30 s or
a GiB, a traceback, a refusal that is no single line of ordinary length and plain characters, a file written, moved or
deleted outside ``folder``, and code that ran: payloads create the file ``marker(folder)``.
"""

from __future__ import annotations

import pkgutil
from pathlib import Path

PREFIX = "kind_"


def names() -> list[str]:
    """The kinds there are, by name."""
    return sorted(m.name.removeprefix(PREFIX) for m in pkgutil.iter_modules(__path__) if m.name.startswith(PREFIX))


def home(kind: str) -> str:
    """The module of a kind; a dotted name is one already."""
    return kind if "." in kind else f"{__name__}.{PREFIX}{kind}"


def marker(folder: Path) -> Path:
    """The file that a payload creates when its code runs: it is outside the draw's folder."""
    return folder.parent / "code-ran"
