"""Writes a file or a folder whole or not at all, and reads the manifest that says what a folder is.

Does: hands out a draft's path beside the target (`splitfx.files.drafts`) and renames it when the writer is done.
Refuses: an existing target unless `overwrite`, however late it came; a folder of someone else's, a file of the user's
under a name that is to be written; a target that is no regular file; a missing parent folder, a place that cannot be
written; a manifest that is missing, damaged, of another kind or of a newer format.
Promises: after an error or a kill at any moment, the target is as it was or as it was to be. The user's own files in a
folder stay there. A link as the target is followed and stays a link.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitfx.errors import SplitfxError
from splitfx.files.drafts import draft_of, recover, replace_folder
from splitfx.files.renames import put
from splitfx.ground import limits
from splitfx.text import shown


@contextmanager
def written_whole(
    path: str | os.PathLike[str], *, overwrite: bool = False, error: type[SplitfxError] = SplitfxError
) -> Iterator[Path]:
    """Yield a path to write to; it becomes `path` when the block ends without an error, else it vanishes.

    The yielded path has the target's own name and lies in a folder of its own beside the target; nothing else that is
    written there is kept. Raises `error` for everything the operating system refuses, in one line with the path.
    """
    target = check_target(path, overwrite=overwrite, error=error)
    with refusals(target, error), draft_of(target) as draft:
        yield draft
        if overwrite and target.exists():
            check_target(target, overwrite=overwrite, error=error)  # it may be another one by now
            shutil.copymode(target, draft)
            os.replace(draft, target)
        else:
            put(draft, target)


def check_target(path: str | os.PathLike[str], *, overwrite: bool, error: type[SplitfxError]) -> Path:
    """The file to write, where a link leads to. Raises `error` when it must not be written, before any long work."""
    target = _followed(Path(path), error)
    if target.is_dir():
        raise error(f"{target}: is a folder that already exists; choose another name or remove it first.")
    if os.path.lexists(path) and not overwrite:
        raise error(f"{path}: already exists; choose another name or pass overwrite=True.")
    if target.exists() and not target.is_file():
        raise error(f"{target}: is no file but a device or a pipe; choose another name.")
    if not target.parent.is_dir():
        raise error(f"{target}: its folder {target.parent} does not exist; create it first.")
    return target


def _followed(path: Path, error: type[SplitfxError]) -> Path:
    """Where a link leads to: a rename would put a file in the place of the link itself."""
    if not path.is_symlink():
        return path
    try:
        return path.resolve()
    except (OSError, RuntimeError) as problem:  # a circle of links
        raise error(f"{path}: is a link that leads nowhere: {problem}.") from None


@contextmanager
def refusals(target: Path, error: type[SplitfxError]) -> Iterator[None]:
    """Tell as ``error``, in one line, what the operating system refuses in the folder of ``target``."""
    try:
        yield
    except FileExistsError as problem:
        if _is_elsewhere(problem, target):
            raise
        raise error(f"{target} appeared while it was written, and is left as it is; choose another name.") from problem
    except OSError as problem:
        if _is_elsewhere(problem, target):
            raise
        raise error(f"{target} cannot be written: {problem.strerror or problem}.") from problem
    except SplitfxError:
        raise
    except Exception as problem:
        if not is_full(problem):
            raise
        raise error(f"{target} cannot be written: {os.strerror(errno.ENOSPC)}.") from problem


def is_full(problem: BaseException | None) -> bool:
    """Whether an error that is not the operating system's comes of a full disk: it may hide behind one of a writer's
    tidying up, or in its own words (torch's, safetensors')."""
    if problem is None:
        return False
    words = ("No space left", "PytorchStreamWriter failed", "File too large")
    known = isinstance(problem, OSError) and problem.errno in (errno.ENOSPC, errno.EFBIG)
    told = not isinstance(problem, SplitfxError) and any(one in str(problem) for one in words)
    return known or told or is_full(problem.__cause__ or problem.__context__)


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
        target = _followed(Path(os.path.abspath(folder)), self.error)
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
            return self.read_manifest(folder).get("kind") == self.writer
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
        return {self.manifest, *(name for name in _named(self.read_manifest(folder)) if name == Path(name).name)}

    def read_manifest(self, folder: Path) -> dict[str, Any]:
        """The manifest of a folder of this kind; its entries are `splitfx.files.typed`'s to check. Raises
        ``error``."""
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
