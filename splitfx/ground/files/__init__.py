"""Writes a file whole or not at all; `splitfx.ground.files.folders` does so with folders.

Does: hands out a draft's path beside the target (`splitfx.ground.files.drafts`) and renames it when the writer is done.
Refuses: an existing target unless `overwrite`, however late it came; a target that is no regular file; a missing
parent folder, a place that cannot be written.
Promises: after an error or a kill at any moment, the target is as it was or as it was to be. A link as the target is
followed and stays a link.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from splitfx.errors import SplitfxError
from splitfx.ground import limits
from splitfx.ground.files.drafts import draft_of
from splitfx.ground.files.renames import put


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
    target = followed(Path(path), error)
    if target.is_dir():
        raise error(f"{target}: is a folder that already exists; choose another name or remove it first.")
    if os.path.lexists(path) and not overwrite:
        raise error(f"{path}: already exists; choose another name or pass overwrite=True.")
    if target.exists() and not target.is_file():
        raise error(f"{target}: is no file but a device or a pipe; choose another name.")
    if not target.parent.is_dir():
        raise error(f"{target}: its folder {target.parent} does not exist; create it first.")
    return target


def followed(path: Path, error: type[SplitfxError]) -> Path:
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
