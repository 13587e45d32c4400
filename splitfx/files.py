"""Writes a file or a folder whole or not at all.

Does: hands out a temporary name in the target's own folder and renames it when the writer is done.
Refuses: an existing target unless `overwrite`, a missing parent folder, a place that cannot be written.
Promises: after an error, the target is as it was and nothing temporary is left.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
