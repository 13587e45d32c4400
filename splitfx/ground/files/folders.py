"""Folders that splitfx writes: whole or not at all, each with a manifest that says what it is and names its files.

Refuses: a folder of someone else's, a file of the user's under a name that is to be written; a manifest that is
missing, damaged, of another kind or of a newer format; files that are missing or cut short.
Promises: after an error or a kill at any moment, the folder is as it was or as it was to be. The user's own files in
it stay there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

from splitfx.errors import SplitfxError
from splitfx.ground import limits
from splitfx.ground.files import followed, read_json, refusals
from splitfx.ground.files.drafts import draft_of, recover, replace_folder
from splitfx.ground.files.renames import put
from splitfx.ground.files.typed import typed
from splitfx.text import shown

M = TypeVar("M")


@dataclass(frozen=True)
class FolderKind(Generic[M]):
    """A kind of folder that splitfx writes: the function that does, the file that names its format, the newest format
    that this splitfx reads, the class of the errors, and what the file says (a `msgspec.Struct`)."""

    writer: str
    manifest: str
    format: int
    error: type[SplitfxError]
    form: type[M]

    def check_target(
        self, folder: str | os.PathLike[str], *, overwrite: bool, advice: str = "pass overwrite=True"
    ) -> Path:
        """The absolute path of a folder to write. Raises ``error`` where it must not be, before any long work."""
        target = followed(Path(os.path.abspath(folder)), self.error)
        if not target.parent.is_dir():
            raise self.error(f"the folder {target.parent} does not exist; create it first.")
        recover(target)
        if os.path.lexists(folder) and not overwrite:
            raise self.error(f"{folder} already exists; choose another name or {advice}.")
        if os.path.lexists(target) and not target.is_dir():
            raise self.error(f"{target} is a file; {self.writer} writes a folder.")
        if target.is_dir() and any(target.iterdir()) and not self.wrote(target):
            raise self.error(f"{target} is no folder of {self.writer}; it is not replaced. Choose another name.")
        if not os.access(target.parent, os.W_OK):
            raise self.error(f"the folder {target.parent} is not writable.")
        return target

    def wrote(self, folder: Path) -> bool:
        """A folder whose manifest says so: a file of the same name may be anybody's."""
        try:
            return self._raw(folder).get("kind") == self.writer
        except self.error:
            return False

    @contextmanager
    def written_whole(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
        """Yield an empty folder to fill; it becomes ``folder`` when the block ends without an error, else it
        vanishes. Of an older folder of this kind, the files that its manifest names are replaced; others stay."""
        target = self.check_target(folder, overwrite=overwrite)
        with refusals(target, self.error), draft_of(target) as draft:
            draft.mkdir()
            yield draft
            if not os.path.lexists(target):
                put(draft, target)
                return
            self.check_target(target, overwrite=overwrite)  # it may have come, or be another one, by now
            ours = self.names(target)
            taken = sorted({*os.listdir(draft)} & ({*os.listdir(target)} - ours))
            if taken:
                raise self.error(f"{target / taken[0]} would be replaced, and {self.writer} did not write it: move it.")
            replace_folder(draft, target, ours)

    def names(self, folder: Path) -> set[str]:
        """The names in a folder of this kind that its writer wrote, as its manifest has them: no other is touched."""
        if not any(folder.iterdir()):
            return set()
        return {self.manifest, *(name for name in _named(self._raw(folder)) if name == Path(name).name)}

    def write_manifest(self, draft: Path, about: M) -> None:
        """Write the manifest, which names every other file, into a folder that is being written."""
        plain = {"format": self.format, "kind": self.writer, **msgspec.to_builtins(about)}
        (draft / self.manifest).write_text(json.dumps(plain, indent=1, allow_nan=False) + "\n", encoding="utf-8")

    def read_manifest(self, folder: Path) -> M:
        """The manifest of a folder of this kind. Raises ``error``."""
        return typed(self._raw(folder), self.form, self.error, str(folder / self.manifest))

    def _raw(self, folder: Path) -> dict[str, Any]:
        path = folder / self.manifest
        recover(Path(os.path.abspath(folder)))
        if not folder.is_dir():
            raise self.error(f"there is no folder {folder}.")
        about = read_json(path, self.error, f"{folder} is not a folder that {self.writer} wrote")
        found = about.get("format") if isinstance(about, dict) else None
        if not isinstance(found, int) or about.get("kind", self.writer) != self.writer:
            raise self.error(f"{path} is not the manifest of a folder that {self.writer} wrote.")
        if found > self.format:
            raise self.error(
                f"{folder} has format {shown(found)}; this splitfx reads up to {self.format}. Install a newer splitfx."
            )
        return about

    def held_file(self, folder: Path, name: Any, size: Any) -> Path:
        """A file that a manifest names, in its own folder and nowhere else. Raises ``error`` where it is missing or
        cut short."""
        if not is_file_name(name) or not isinstance(size, int):
            raise self.error(f"{folder / self.manifest} is damaged: {shown(name)} is no file of this folder.")
        path = folder / name
        if not path.is_file():
            raise self.error(f"{path} is missing.")
        if path.stat().st_size < size:
            raise self.error(f"{path} is truncated: {path.stat().st_size} of {size} bytes.")
        return path


def is_file_name(name: Any) -> bool:
    """Whether a manifest may name a file of its own folder so."""
    if not isinstance(name, str) or name != Path(name).name or name in ("", ".."):
        return False
    try:
        return len(os.fsencode(name)) <= limits.FILE_NAME
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def _named(about: Any) -> Iterator[str]:
    """The files that a manifest names: the keys of its ``bytes``, and every ``file``."""
    if isinstance(about, list):
        for one in about:
            yield from _named(one)
    elif isinstance(about, dict):
        sizes, file = about.get("bytes"), about.get("file")
        yield from sizes if isinstance(sizes, dict) else ()
        yield from (file,) if isinstance(file, str) else ()
        for one in about.values():
            yield from _named(one)
