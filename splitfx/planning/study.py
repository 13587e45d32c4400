"""What a look for plans has found so far, in the folder of a `SearchStudy`: a look that was stopped goes on with it.

Promises: what was counted, measured and trained is not done again; a folder that was begun for another model, other
budgets or other data is refused.
"""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
from torch import fx

from splitfx import storage
from splitfx.errors import PlanError
from splitfx.ground.files import written_whole
from splitfx.ground.files.typed import read_typed

LOOKED, TRAINED = "looked.json", "trained"


class Row(msgspec.Struct):
    """A plan that was looked at: as text ("" where it does nothing here), or why it cannot be had."""

    plan: str = ""
    refused: str = ""
    time: float | None = None  # as a ratio to the model's
    spread: float = 0.0  # ± of that


class Learned(msgspec.Struct):
    """What weights from data gave: accuracy in percent, and how they were found."""

    accuracy: float
    how: str


class Looked(msgspec.Struct):
    about: dict[str, str]
    seconds: float | None = None  # of the model as it is
    accuracy: float | None = None  # likewise
    rows: dict[str, Row] = {}  # by the name of a plan
    learned: dict[str, Learned] = {}  # by the digest of a plan


class Notebook:
    """The file, read once and written after every step; without a folder all is forgotten in the end."""

    def __init__(self, folder: Path | None, about: dict[str, str]) -> None:
        self.folder, self.known = folder, Looked(about)
        if folder is None or not (folder / LOOKED).is_file():
            return
        self.known = read_typed(folder / LOOKED, Looked, PlanError, f"there is no file {folder / LOOKED}")
        for name, here in about.items():
            if self.known.about.get(name) != here:
                there = self.known.about.get(name)
                raise PlanError(f"{folder} holds another look: {name} is {there} there, {here} here; choose another")

    def write(self) -> None:
        if self.folder is not None:
            with written_whole(self.folder / LOOKED, overwrite=True, error=PlanError) as draft:
                draft.write_text(json.dumps(msgspec.to_builtins(self.known), indent=1), encoding="utf-8")

    def row(self, name: str, row: Row) -> Row:
        self.known.rows[name] = row
        self.write()
        return row

    def keep(self, digest: str, split: fx.GraphModule, learned: Learned) -> None:
        if self.folder is None:
            return
        (self.folder / TRAINED).mkdir(exist_ok=True)
        storage.save(split, self.folder / TRAINED / digest, overwrite=True)  # before it is said to be there
        self.known.learned[digest] = learned
        self.write()

    def kept(self, digest: str) -> tuple[fx.GraphModule, Learned] | None:
        learned = self.known.learned.get(digest)
        if learned is None or self.folder is None:
            return None
        return storage.load(self.folder / TRAINED / digest), learned
