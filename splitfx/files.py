"""Writes a file or a folder whole or not at all, and reads the manifest that says what a folder is.

Does: hands out a temporary name in the target's own folder and renames it when the writer is done.
Refuses: an existing target unless `overwrite`, a folder of someone else's, a missing parent folder, a place that
cannot be written; a manifest that is missing, damaged, of another kind or of a newer format.
Promises: after an error, the target is as it was and nothing temporary is left.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitfx import limits
from splitfx.errors import SplitfxError


@contextmanager
def written_whole(
    path: str | os.PathLike[str], *, overwrite: bool = False, error: type[SplitfxError] = SplitfxError
) -> Iterator[Path]:
    """Yield a path to write to; it becomes `path` when the block ends without an error, else it vanishes.

    The yielded path has the target's own name and lies in a temporary folder beside the target; the
    writer may create a file or a folder there. Only that one is moved to the target, nothing written
    next to it. An existing folder is never replaced, with `overwrite` or without. Raises `error` for
    everything the operating system refuses, in one line with the path.
    """
    target = Path(path)
    check_target(target, overwrite=overwrite, error=error)
    try:
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as problem:
        raise error(f"{target}: cannot write here: {problem.strerror or problem}.") from problem
    try:
        yield scratch / target.name
        os.replace(scratch / target.name, target)
    except OSError as problem:
        if _is_elsewhere(problem, target):
            raise
        raise error(f"{target}: cannot be written: {problem.strerror or problem}.") from problem
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check_target(path: str | os.PathLike[str], *, overwrite: bool, error: type[SplitfxError]) -> None:
    """Raise `error` when `path` must not be written, before any long work is done for it."""
    target = Path(path)
    if target.is_dir():
        raise error(f"{target}: is a folder that already exists; choose another name or remove it first.")
    if os.path.lexists(target) and not overwrite:
        raise error(f"{target}: already exists; choose another name or pass overwrite=True.")
    if not target.parent.is_dir():
        raise error(f"{target}: its folder {target.parent} does not exist; create it first.")


@dataclass(frozen=True)
class FolderKind:
    """A kind of folder that splitfx writes: the function that does, the file that names its format, the newest format
    that this splitfx reads, and the class of the errors."""

    writer: str
    manifest: str
    format: int
    error: type[SplitfxError]

    def check_target(
        self, folder: str | os.PathLike[str], *, overwrite: bool, advice: str = "pass overwrite=True"
    ) -> Path:
        """The absolute path of a folder to write. Raises ``error`` where it must not be, before any long work."""
        target = Path(os.path.abspath(folder))
        if not target.parent.is_dir():
            raise self.error(f"the folder {target.parent} does not exist; create it first.")
        if os.path.lexists(target) and not overwrite:
            raise self.error(f"{target} already exists; choose another name or {advice}.")
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
            return self.read_manifest(folder).get("kind") == self.writer
        except self.error:
            return False

    @contextmanager
    def written_whole(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
        """Yield an empty folder to fill; it becomes ``folder`` when the block ends without an error, else it
        vanishes. An older folder of this kind is moved aside first, and back again if that fails."""
        target = self.check_target(folder, overwrite=overwrite)
        try:
            with tempfile.TemporaryDirectory(
                prefix=f".{target.name}.", dir=target.parent, ignore_cleanup_errors=True
            ) as scratch:
                draft, old = Path(scratch) / target.name, Path(scratch) / "replaced"
                draft.mkdir()
                yield draft
                if target.exists():
                    os.rename(target, old)
                try:
                    os.rename(draft, target)
                except OSError:
                    if old.exists():
                        os.rename(old, target)
                    raise
        except OSError as problem:
            if _is_elsewhere(problem, target):
                raise
            raise self.error(f"{target} cannot be written: {problem.strerror or problem}.") from problem

    def read_manifest(self, folder: Path, **lists: type) -> dict[str, Any]:
        """The manifest of a folder, with these entries of these types. Raises ``error``."""
        path = folder / self.manifest
        if not folder.is_dir():
            raise self.error(f"there is no folder {folder}.")
        about = read_json(path, self.error, f"{folder} is not a folder that {self.writer} wrote")
        found = about.get("format") if isinstance(about, dict) else None
        if not isinstance(found, int) or about.get("kind", self.writer) != self.writer:
            raise self.error(f"{path} is not the manifest of a folder that {self.writer} wrote.")
        if found > self.format:
            raise self.error(
                f"{folder} has format {found}; this splitfx reads up to {self.format}. Install a newer splitfx."
            )
        wrong = [key for key, kind in lists.items() if not isinstance(about.get(key), kind)]
        if wrong:
            raise self.error(f"{path} is damaged: see {', '.join(wrong)}.")
        return about

    def held_file(self, folder: Path, name: Any, size: Any) -> Path:
        """A file that a manifest names, in its own folder and nowhere else. Raises ``error`` where it is missing or
        cut short."""
        if not isinstance(name, str) or not isinstance(size, int) or name != Path(name).name:
            raise self.error(f"{folder / self.manifest} is damaged: {name!r} is no file of this folder.")
        path = folder / name
        if not path.is_file():
            raise self.error(f"{path} is missing.")
        if path.stat().st_size < size:
            raise self.error(f"{path} is truncated: {path.stat().st_size} of {size} bytes.")
        return path


def _is_elsewhere(problem: OSError, target: Path) -> bool:
    """A file that the caller's block read, not one that is written here."""
    name = problem.filename
    return isinstance(name, str | os.PathLike) and not Path(name).absolute().is_relative_to(target.parent.absolute())


def read_text(path: Path, *, most: int) -> str:
    """A text file, without the byte order mark that editors put in front. Raises `OSError`; `ValueError`, with words,
    for what is not UTF-8 and for files of more than ``most`` bytes, of which no more is read."""
    with open(path, "rb") as file:
        held = file.read(most + 1)
    if len(held) > most:
        raise ValueError(f"it has more than {most} bytes")
    try:
        return held.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise ValueError(f"not UTF-8 text (byte {problem.start})") from None


def read_json(path: Path, error: type[SplitfxError], missing: str) -> Any:
    """A file's JSON. Raises ``error`` in one line; ``missing`` says what it means that the file is not there."""
    try:
        return json.loads(read_text(path, most=limits.JSON_BYTES))
    except FileNotFoundError:
        raise error(f"{path} is missing; {missing}.") from None
    except OSError as problem:
        raise error(f"{path} cannot be read: {problem.strerror or problem}.") from problem
    except (ValueError, RecursionError) as problem:
        raise error(f"{path} is not readable JSON: {problem}.") from None
