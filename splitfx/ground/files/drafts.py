"""Drafts: what is written lies in a hidden folder beside its target until it is whole.

A draft folder is `.NAME.RANDOM.splitfx` and holds `new/NAME`, a file that its writer keeps locked, and while a folder
is replaced `old/NAME` and `ours.json` (the names in it that splitfx wrote). The operating system frees the lock when
the writer is killed, which tells its drafts from those of writers at work.

Promises: whoever writes beside a draft of a killed writer, or finds its target gone, clears it away: a folder that was
moved aside and not replaced gets its name back, and no file of the user's goes with a draft.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from splitfx.ground.files.renames import exchange, put

SUFFIX = ".splitfx"
NEW, OLD, OURS, LOCK = "new", "old", "ours.json", "lock"


@contextmanager
def draft_of(target: Path) -> Iterator[Path]:
    """Yield the path to write what becomes ``target``, in a folder of its own; nothing of it is left afterwards.

    Raises `OSError` where the folder of ``target`` cannot be written to.
    """
    sweep(target.parent)
    holder, lock = _begun(target)
    tidied = False  # what cannot be put back now stays for whoever sweeps next
    try:
        yield holder / NEW / target.name
    finally:
        try:
            _put_back(holder)
            tidied = True
        finally:
            os.close(lock)
            if tidied:
                shutil.rmtree(holder, ignore_errors=True)


def _begun(target: Path) -> tuple[Path, int]:
    """A draft folder and its lock. Until the lock is held, another process takes the folder for a killed writer's."""
    while True:
        holder = Path(tempfile.mkdtemp(prefix=f".{target.name[:40]}.", suffix=SUFFIX, dir=target.parent))
        lock = None
        try:
            lock = os.open(holder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
            if locked(lock):
                (holder / NEW).mkdir()
                return holder, lock
            os.close(lock)
        except OSError as problem:
            if lock is not None:
                os.close(lock)
            shutil.rmtree(holder, ignore_errors=True)
            if not isinstance(problem, FileNotFoundError) or not target.parent.is_dir():
                raise


def replace_folder(draft: Path, target: Path, ours: Iterable[str]) -> None:
    """Put the folder ``draft`` in the place of ``target``, which keeps all files whose names are not ``ours``.

    Killed at any moment, this leaves the old folder or the new one under the name, each with the user's files; where
    the operating system cannot exchange two names, it may be a moment's work of the next reader to give it back.
    """
    holder, written = draft.parent.parent, {*ours, *os.listdir(draft)}
    part = holder / f"{OURS}.part"
    part.write_text(json.dumps(sorted(written)), encoding="utf-8")
    os.replace(part, holder / OURS)
    for name in set(os.listdir(target)) - written:
        _carry(target / name, draft / name)
    shutil.copymode(target, draft)
    if exchange(draft, target):
        return
    aside = holder / OLD / target.name
    aside.parent.mkdir()
    os.rename(target, aside)
    try:
        put(draft, target)
    except OSError:
        put(aside, target)
        raise


def recover(target: Path) -> None:
    """Give a folder its name back that a killed writer had moved aside."""
    if not os.path.lexists(target) and target.parent.is_dir():
        sweep(target.parent)


def sweep(folder: Path) -> None:
    """Clear away the drafts of killed writers in ``folder``, as far as they are this user's."""
    with contextlib.suppress(OSError):  # a draft that another process clears away too, or none may touch
        holders = [entry for entry in os.scandir(folder) if entry.name.startswith(".") and entry.name.endswith(SUFFIX)]
        for entry in holders:
            if entry.is_dir(follow_symlinks=False) and entry.stat().st_uid == _user(entry):
                _sweep(Path(entry.path))


def _user(entry: os.DirEntry[str]) -> int:
    return os.geteuid() if hasattr(os, "geteuid") else entry.stat().st_uid


def _sweep(holder: Path) -> None:
    if not set(os.listdir(holder)) <= {NEW, OLD, OURS, f"{OURS}.part", LOCK}:
        return  # somebody else's
    lock = os.open(holder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        mine = locked(lock)
        if mine:
            _put_back(holder)
    finally:
        os.close(lock)
    if mine:
        shutil.rmtree(holder, ignore_errors=True)


def locked(file: int) -> bool:
    """Whether the lock is ours now. A process that ends, in whatever way, gives it back."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _put_back(holder: Path) -> None:
    """Before a draft folder goes: a folder moved aside and not replaced takes its name again, and a file of the user's
    that came into the old folder while it was replaced moves into the new one."""
    for place in (holder / OLD, holder / NEW):
        for held in place.iterdir() if place.is_dir() else ():
            target = holder.parent / held.name
            if place.name == OLD and not os.path.lexists(target):
                put(held, target)
            elif (holder / OURS).is_file() and held.is_dir() and target.is_dir():
                _save(held, target, set(json.loads((holder / OURS).read_text(encoding="utf-8"))))


def _save(held: Path, target: Path, ours: set[str]) -> None:
    for name in set(os.listdir(held)) - ours:
        if not os.path.lexists(target / name):
            put(held / name, target / name)


def _carry(source: Path, goal: Path) -> None:
    """The same file, or folder of files, under a second name: whichever goes, the other stays."""
    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, goal, symlinks=True, copy_function=_link)
    else:
        _link(source, goal)


def _link(source: str | Path, goal: str | Path) -> None:
    try:
        os.link(source, goal, follow_symlinks=False)
    except OSError:  # a file system without links, or with fewer
        shutil.copy2(source, goal, follow_symlinks=False)
