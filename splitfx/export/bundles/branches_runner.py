"""`Branches`: runs the folder of ONNX files that `export_branches` wrote, all of it or some groups.

Parts run one after the other, values go from part to part by name, and the merge puts the logits into the user's order
of classes. Opened for some groups it reads only their files and gives their logits, to be merged elsewhere.
Refuses (`ExportError`): a folder of something else or of a newer format, files that are missing, cut short or changed,
inputs that do not fit.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from msgspec import Meta, Struct

from splitfx.errors import ExportError
from splitfx.export.bundles.opened import Opened
from splitfx.export.data_files import data_files
from splitfx.ground.files.folders import FolderKind, is_file_name
from splitfx.ground.files.typed import Count, Text
from splitfx.ground.table import number, size, table
from splitfx.splitnet.arguments import bound
from splitfx.splitnet.tree import MERGE
from splitfx.text import shown


@dataclass(frozen=True)
class OnnxPart:
    """One part of a manifest. ``inputs`` and ``outputs``: values by name, in the order of the file's own. ``groups``:
    those that need it; none for the merge. ``macs`` for one call in the traced sizes."""

    name: Text
    file: Text
    bytes: Count
    sha256: str
    groups: tuple[Count, ...]
    inputs: tuple[Text, ...]
    outputs: Annotated[tuple[Text, ...], Meta(min_length=1)]
    macs: Count
    params: Count


class Manifest(Struct):
    inputs: Annotated[tuple[Text, ...], Meta(min_length=1)]
    arguments: tuple[tuple[str, str], ...]
    classes: Annotated[tuple[Annotated[tuple[Count, ...], Meta(min_length=1)], ...], Meta(min_length=1)]
    parts: list[OnnxPart]
    model: str = ""

    def __post_init__(self) -> None:
        if len(self.arguments) != len(self.inputs):
            raise ValueError(f"see arguments: {len(self.arguments)} of {len(self.inputs)} inputs")
        if len({part.name for part in self.parts}) != len(self.parts):
            raise ValueError("see parts: two have one name")
        if [part.name for part in self.parts].count(MERGE) != 1 or self.parts[-1].name != MERGE:
            raise ValueError("it names no one part that merges, at the end")
        named = [one for own in self.classes for one in own]
        if sorted(named) != list(range(len(named))):
            raise ValueError("see classes: not every class is in one group")
        if any(group >= len(self.classes) for part in self.parts for group in part.groups):
            raise ValueError(f"see parts: there are {len(self.classes)} groups")


KIND = FolderKind("export_branches", "branches.json", 1, ExportError, Manifest)


class Branches:
    """Opens a folder that `export_branches` wrote, on one onnxruntime provider.

    ``groups``: only these, for a process that runs some of the branches: it has the parts that they need, and gives
    `pieces`. ``threads``: of onnxruntime, None for torch's number. ``parts``, ``classes`` (of each group, in the order
    of its logits) and ``inputs`` as in the manifest. Raises `ExportError`.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        provider: str = "cpu",
        threads: int | None = None,
        groups: Iterable[int] | None = None,
    ) -> None:
        self._opened = Opened(KIND, folder, provider, threads)
        self.folder, about = self._opened.folder, self._opened.about
        self.inputs, self.arguments, self.classes = about.inputs, about.arguments, about.classes
        everyone = range(len(self.classes))
        self.groups = tuple(everyone) if groups is None else tuple(sorted(set(groups)))
        wrong = next((g for g in self.groups if g not in everyone), None)
        if wrong is not None or not self.groups:
            raise ExportError(
                f"the groups of {self.folder} are 0 to {len(everyone) - 1}; asked for {list(self.groups)}."
            )
        whole = len(self.groups) == len(everyone)
        listed = about.parts
        self.parts = tuple(p for p in listed if set(p.groups) & set(self.groups) or (whole and p.name == MERGE))
        self._logits = next(p.inputs for p in listed if p.name == MERGE)
        self._check_values(listed)
        if whole:
            self._check_values(self.parts)
        for part in self.parts:
            _check_file(self.folder, part)
            if len(self._opened.session(part.file).get_outputs()) != len(part.outputs):
                raise ExportError(f"{self._opened.manifest} is damaged: {part.file} gives other values than it says.")

    def _check_values(self, listed: Iterable[OnnxPart]) -> None:
        """Every value that a part reads is given by one in front of it; the merge reads one per group."""
        known = set(self.inputs)
        for part in listed:
            lost = next((name for name in part.inputs if name not in known), None)
            if lost is not None:
                reads = f"{part.name} reads {shown(lost)}, which no part in front of it gives"
                raise ExportError(f"{self._opened.manifest} is damaged: {reads}.")
            known |= set(part.outputs)
        if len(self._logits) != len(self.classes):
            raise ExportError(
                f"{self._opened.manifest} is damaged: its parts and its {len(self.classes)} groups differ."
            )

    def run(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The logits (or what the model makes of them) in the user's order of classes. Raises `ExportError`."""
        if len(self.groups) < len(self.classes):
            raise ExportError(
                f"only groups {list(self.groups)} are open: call pieces, and merge all of them elsewhere."
            )
        return self._values(args, kwargs)[self.parts[-1].outputs[0]]

    def pieces(self, *args: Any, **kwargs: Any) -> dict[int, torch.Tensor]:
        """The logits of each open group, its classes in the order of ``classes[group]``. Raises `ExportError`."""
        values = self._values(args, kwargs)
        return {g: values[self._logits[g]] for g in self.groups}

    def _values(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        try:
            values = dict(zip(self.inputs, bound(self.arguments, args, kwargs), strict=True))
        except ValueError as error:
            raise ExportError(f"{error}.") from None
        for part in self.parts:
            made, _ = self._opened.run(part.file, tuple(values[name] for name in part.inputs))
            values |= dict(zip(part.outputs, made, strict=True))
        return values

    def __str__(self) -> str:
        rows = [
            (
                p.name,
                sum(len(self.classes[g]) for g in p.groups) or "-",
                number(p.params),
                number(p.macs),
                size(p.bytes),
            )
            for p in self.parts
        ]
        return table(("part", "classes", "parameters", "MACs", "file"), rows)


# ---------------------------------------------------------------- reading


def _check_file(folder: Path, part: OnnxPart) -> None:
    path = folder / part.file
    if not is_file_name(part.file):
        raise ExportError(f"{folder / KIND.manifest} is damaged: {part.file!r} is no file of this folder.")
    if not path.is_file():
        raise ExportError(f"{path} is missing: copy the file of {part.name} there, or export again.")
    found = fingerprint(path)
    if found["bytes"] != part.bytes:
        raise ExportError(
            f"{path} is damaged: {found['bytes']} bytes instead of {part.bytes}; copy or export it again."
        )
    if found["sha256"] != part.sha256:
        raise ExportError(f"{path} is damaged or of another export: its SHA-256 differs; copy or export it again.")


def fingerprint(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file; weights beside it would escape both."""
    if data_files(path):
        raise ExportError(f"{path.stem} holds more than 2 GB of weights; split the model into more groups.")
    with open(path, "rb") as held:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(held, "sha256").hexdigest()}
