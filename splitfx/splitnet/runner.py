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
from typing import Any

import torch

from splitfx.errors import ExportError
from splitfx.export import sessions
from splitfx.export.data_files import data_files
from splitfx.files import FolderKind
from splitfx.report.table import number, size, table
from splitfx.splitnet.arguments import Argument, bound
from splitfx.splitnet.tree import MERGE

KIND = FolderKind("export_branches", "branches.json", 1, ExportError)


@dataclass(frozen=True)
class OnnxPart:
    """One part of a manifest. ``inputs`` and ``outputs``: values by name, in the order of the file's own. ``groups``:
    those that need it; none for the merge. ``macs`` for one call in the traced sizes."""

    name: str
    file: str
    bytes: int
    sha256: str
    groups: tuple[int, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    macs: int
    params: int


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
        self.folder, full = Path(folder), sessions.full_name(provider)
        about = _manifest(self.folder)
        self.inputs: tuple[str, ...] = tuple(about["inputs"])
        self.arguments: tuple[Argument, ...] = tuple((name, where) for name, where in about["arguments"])
        self.classes = tuple(tuple(own) for own in about["classes"])
        everyone = range(len(self.classes))
        self.groups = tuple(everyone) if groups is None else tuple(sorted(set(groups)))
        wrong = next((g for g in self.groups if g not in everyone), None)
        if wrong is not None or not self.groups:
            raise ExportError(
                f"the groups of {self.folder} are 0 to {len(everyone) - 1}; asked for {list(self.groups)}."
            )
        whole = len(self.groups) == len(everyone)
        listed = [_part(row, self.folder) for row in about["parts"]]
        self.parts = tuple(p for p in listed if set(p.groups) & set(self.groups) or (whole and p.name == MERGE))
        self._logits = next(p.inputs for p in listed if p.name == MERGE)
        self._check_values(listed)
        self._sessions = {}
        for part in self.parts:
            file = _checked_file(self.folder, part)
            options = sessions.session_options(threads or torch.get_num_threads())
            self._sessions[part.name] = session = sessions.open_session(file, full, options)
            if len(session.get_outputs()) != len(part.outputs):
                raise ExportError(
                    f"{self.folder / KIND.manifest} is damaged: {file.name} gives other values than it says."
                )

    def _check_values(self, listed: list[OnnxPart]) -> None:
        """Every value that a part reads is given by one in front of it; the merge reads one per group."""
        known = set(self.inputs)
        for part in listed:
            lost = next((name for name in part.inputs if name not in known), None)
            if lost is not None:
                where = self.folder / KIND.manifest
                raise ExportError(
                    f"{where} is damaged: {part.name} reads {lost!r}, which no part in front of it gives."
                )
            known |= set(part.outputs)
        if len(self._logits) != len(self.classes) or not all(p.outputs for p in listed):
            raise ExportError(
                f"{self.folder / KIND.manifest} is damaged: its parts and its {len(self.classes)} groups differ."
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
            session = self._sessions[part.name]
            read = tuple(values[name] for name in part.inputs)
            feed = sessions.feeds(session, read, {}, self.folder / part.file)
            made = [torch.from_numpy(one) for one in session.run(None, feed)]
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


def _manifest(folder: Path) -> dict[str, Any]:
    about = KIND.read_manifest(folder, inputs=list, arguments=list, classes=list, parts=list)
    path = folder / KIND.manifest
    right = {
        "inputs": _all(about["inputs"], str),
        "arguments": len(about["arguments"]) == len(about["inputs"])
        and all(_all(one, str) and len(one) == 2 for one in about["arguments"]),
        "classes": all(_all(own, int) for own in about["classes"]),
    }
    wrong = [key for key in ("inputs", "arguments", "classes", "parts") if not about[key] or not right.get(key, True)]
    if wrong:
        raise ExportError(f"{path} is damaged: see {', '.join(wrong)}.")
    if sum(isinstance(row, dict) and row.get("name") == MERGE for row in about["parts"]) != 1:
        raise ExportError(f"{path} is damaged: it names no one part that merges.")
    return about


def _all(found: Any, kind: type) -> bool:
    return isinstance(found, list) and all(isinstance(one, kind) for one in found)


def _part(row: Any, folder: Path) -> OnnxPart:
    kinds = {"name": str, "file": str, "sha256": str, "bytes": int, "macs": int, "params": int}
    listed = {"groups": int, "inputs": str, "outputs": str}
    ok = isinstance(row, dict) and all(isinstance(row.get(key), kind) for key, kind in kinds.items())
    if not ok or not all(_all(row.get(key), kind) for key, kind in listed.items()):
        raise ExportError(f"{folder / KIND.manifest} is damaged: a part lacks its file, groups, inputs or outputs.")
    given: dict[str, Any] = {key: tuple(row[key]) if key in listed else row[key] for key in (*kinds, *listed)}
    return OnnxPart(**given)


def _checked_file(folder: Path, part: OnnxPart) -> Path:
    path = folder / part.file
    if part.file != path.name:
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
    return path


def fingerprint(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file; weights beside it would escape both."""
    if data_files(path):
        raise ExportError(f"{path.stem} holds more than 2 GB of weights; split the model into more groups.")
    with open(path, "rb") as held:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(held, "sha256").hexdigest()}
