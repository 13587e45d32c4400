"""The commands, one file each: ``TEXT`` says what it does, ``arguments`` adds what it takes to its parser, ``run`` does
it, prints to stdout and returns the exit code.

Everything that can be refused is refused before work starts: files that are there already, plans, passes. All but the
parser is imported inside ``run``, so that ``splitfx --help`` answers at once.
"""

from __future__ import annotations

from types import ModuleType

from splitfx.cli.commands import (
    check,
    compare,
    completion,
    diff,
    doctor,
    explain,
    export,
    finetune,
    inspect,
    measure,
    passes,
    plan,
    profile,
    search,
    transform,
)

_ORDER = (
    plan,
    profile,
    transform,
    inspect,
    export,
    check,
    compare,
    diff,
    measure,
    explain,
    finetune,
    search,
    passes,
    doctor,
    completion,
)
COMMANDS: dict[str, ModuleType] = {one.__name__.rpartition(".")[2]: one for one in _ORDER}  # in the order of --help
