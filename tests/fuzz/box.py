"""One draw in its box: a folder of its own inside a folder that must stay as it is, and a hook on file operations.

The hook sees what Python opens, moves and deletes anywhere; what native code writes shows by the listing of the box.
"""

from __future__ import annotations

import importlib
import os
import resource
import shutil
import sys
import tempfile
import traceback
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitfx.errors import SplitfxError
from tests.fuzz import home, marker

LINE = 600  # characters of a refusal
MEMORY = 2**30  # bytes that one draw may add to the process's peak
DIRECTIONS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # of writing
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_PATHS = {  # audit event -> which of its arguments are paths that change
    "os.rename": (0, 1),
    "os.remove": (0,),
    "os.mkdir": (0,),
    "os.rmdir": (0,),
    "os.link": (1,),
    "os.symlink": (1,),
    "os.truncate": (0,),
    "os.chmod": (0,),
    "os.chown": (0,),
    "shutil.rmtree": (0,),
}


@dataclass(frozen=True)
class Result:
    """A draw's word; ``fault`` says what went wrong, in full, and is empty where nothing did."""

    word: str
    fault: str = ""


class Hook:
    """Remembers file operations outside the allowed folders. Python keeps an audit hook for ever: it is made once."""

    def __init__(self) -> None:
        self.allowed: tuple[str, ...] = ()
        self.seen: list[str] = []
        sys.addaudithook(self)

    def __call__(self, event: str, args: Any) -> None:
        if not self.allowed:
            return
        if event == "os.system":
            self.seen.append(f"{event}{args!r}")
        if event == "open" and isinstance(args[2], int) and args[2] & _WRITES:
            self.look(event, args[0])
        for place in _PATHS.get(event, ()):
            if place < len(args):
                self.look(event, args[place])

    def look(self, event: str, path: Any) -> None:
        if not isinstance(path, str | bytes | os.PathLike):
            return  # a descriptor: its opening was seen
        real = os.path.join(os.path.realpath(os.path.dirname(os.fsdecode(path))), os.path.basename(os.fsdecode(path)))
        if not any(real == root or real.startswith(root + os.sep) for root in self.allowed):
            self.seen.append(f"{event} {real}")


_hook: list[Hook] = []


def hook() -> Hook:
    if not _hook:
        _hook.append(Hook())
    return _hook[0]


@contextmanager
def boxed(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """An empty folder in an empty box inside ``root``, as working directory; yields it and what goes wrong in it."""
    box = Path(tempfile.mkdtemp(prefix="box-", dir=root)).resolve()
    folder, scratch = box / "folder", box / "tmp"
    folder.mkdir()
    scratch.mkdir()
    (box / "canary").write_text("not yours")
    before, wrong = _listing(box), []
    was, was_temp, was_variable = os.getcwd(), tempfile.tempdir, os.environ.get("TMPDIR")
    os.chdir(folder)
    tempfile.tempdir = os.environ["TMPDIR"] = str(scratch)
    compiles, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # a module that a draw is the first to import
    watch = hook()
    watch.seen.clear()
    watch.allowed = (str(folder), str(scratch), "/dev", "/proc")
    try:
        yield folder, wrong
    finally:
        watch.allowed = ()
        sys.dont_write_bytecode = compiles
        os.chdir(was)
        tempfile.tempdir = was_temp
        os.environ.pop("TMPDIR")
        os.environ |= {} if was_variable is None else {"TMPDIR": was_variable}
        if marker(folder).exists():
            wrong.append("code ran: the marker was made")
        elif watch.seen:
            wrong.append(f"outside its folder: {'; '.join(watch.seen[:3])}")
        elif _listing(box) != before:
            wrong.append(f"outside its folder: {sorted(set(_listing(box).items()) ^ set(before.items()))}")
        shutil.rmtree(box, ignore_errors=True)


def _listing(box: Path) -> dict[str, tuple[int, int]]:
    found = [p for p in box.iterdir() if p.name not in ("folder", "tmp")]
    return {p.name: (p.lstat().st_size, p.lstat().st_mtime_ns) for p in found}


def prepare(kind: str) -> None:
    getattr(importlib.import_module(home(kind)), "prepare", lambda: None)()


def run_draw(kind: str, seed: int, root: Path) -> Result:
    """One draw of ``kind``, watched. Only a crash of the process or a hang are left to the caller."""
    module = importlib.import_module(home(kind))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with boxed(root) as (folder, wrong):
        result = _tried(module.draw, seed, folder)
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak)
    if grown > MEMORY:
        wrong.append(f"it took {grown / 2**30:.1f} GiB")
    return Result("fault", "\n".join([*wrong, result.fault])) if wrong else result


def _tried(draw: Any, seed: int, folder: Path) -> Result:
    try:
        word = draw(seed, folder)
    except SplitfxError as error:
        unplain = refusal_fault(str(error))
        return Result("fault", f"{unplain}: {error!r}") if unplain else Result("refused")
    except Exception:
        return Result("fault", traceback.format_exc())
    return Result(word) if word and word != "fault" else Result("fault", f"draw() returned {word!r}, not a word")


def refusal_fault(message: str) -> str:
    """What keeps a message from being one line of ordinary length that a terminal can print; empty where it is."""
    if "\n" in message or not message.strip():
        return "a refusal that is not one line"
    if len(message) > LINE:
        return f"a refusal of {len(message)} characters"
    return "a refusal with control characters" if any(map(obeyed, message)) else ""


def obeyed(character: str) -> bool:
    """A terminal or an editor would act on it instead of showing it. An unassigned character is only shown badly."""
    return unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in DIRECTIONS
