"""Files and folders are written whole or not at all: whatever appears, whoever is killed, wherever links lead."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import stat
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from splitfx.errors import ExportError, SplitfxError
from splitfx.export.data_files import data_files, written_with_data
from splitfx.ground.files import check_target, drafts, renames, written_whole
from splitfx.ground.files.drafts import SUFFIX, draft_of, sweep
from splitfx.ground.files.folders import FolderKind

KIND = FolderKind("a test", "about.json", 1, ExportError, dict)
MOST = 60  # renames, links and removals that one write may take
posix = pytest.mark.skipif(sys.platform == "win32", reason="processes are killed as on POSIX")


@pytest.fixture(params=["exchange", "portable"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The operating system's own renames, and what stands for them where it has none."""
    if request.param == "portable":
        monkeypatch.setattr(renames, "_renameat2", lambda old, new, how: False)
    return request.param


def file(path: Path, text: str, overwrite: bool = True) -> None:
    with written_whole(path, overwrite=overwrite) as draft:
        draft.write_text(text)


def folder(path: Path, text: str, overwrite: bool = True, extra: tuple[str, ...] = ()) -> None:
    names = ["a.txt", "b.txt", f"only-{text}.txt", *extra]
    with KIND.written_whole(path, overwrite=overwrite) as draft:
        for name in names:
            (draft / name).write_text(text)
        about = {"format": 1, "kind": "a test", "bytes": dict.fromkeys(names, 1), "text": text}
        (draft / "about.json").write_text(json.dumps(about))


def left(path: Path) -> list[str]:
    return [one.name for one in path.iterdir() if one.name.endswith(SUFFIX)]


def killed_at(number: int, when: str, work: Callable[[], None]) -> bool:
    """Do ``work`` in a process that is killed before or after its ``number``-th rename, link or removal; False where
    it takes fewer."""
    pid = os.fork()
    if pid == 0:
        count = 0

        def deadly(real: Callable) -> Callable:
            def call(*args: object, **kwargs: object) -> object:
                nonlocal count
                count += 1
                if count == number and when == "before":
                    os.kill(os.getpid(), signal.SIGKILL)
                result = real(*args, **kwargs)
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            return call

        for name in ("rename", "replace", "link", "unlink", "rmdir", "mkdir"):
            setattr(os, name, deadly(getattr(os, name)))
        renames._renameat2 = deadly(renames._renameat2)
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or status == 0
    return os.WIFSIGNALED(status)


def at_every_step(work: Callable[[], None], look: Callable[[], None]) -> int:
    """``look`` after a kill before and after every step of ``work``; how many steps there were."""
    for number in range(1, MOST):
        for when in ("before", "after"):
            if not killed_at(number, when, work):
                return number
            look()
    raise AssertionError("it never ends")


# ---------------------------------------------------------------- killed at any moment


@posix
def test_a_file_is_old_or_new_after_a_kill_at_every_step(tmp_path: Path, system: str):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def look() -> None:
        assert path.read_text() in ("old", "new")
        path.write_text("old")

    assert at_every_step(lambda: file(path, "new"), look) > 2
    file(path, "newest")
    assert [one.name for one in tmp_path.iterdir()] == ["a.txt"]  # the drafts of all who were killed are gone


@posix
def test_a_folder_is_old_or_new_after_a_kill_at_every_step(tmp_path: Path, system: str):
    path = tmp_path / "split"
    folder(path, "old")
    (path / "notes.md").write_text("mine")
    (path / "runs" / "1").mkdir(parents=True)
    (path / "runs" / "1" / "log").write_text("mine")
    (path / "link").symlink_to("notes.md")
    seen = set()

    def look() -> None:
        text = KIND.read_manifest(path)["text"]  # which gives the folder its name back, where a writer had moved it
        seen.add(text)
        ours = {"about.json", "a.txt", "b.txt", f"only-{text}.txt"}
        assert {one.name for one in path.iterdir()} == {*ours, "notes.md", "runs", "link"}
        assert {(path / name).read_text() for name in ours - {"about.json"}} == {text}
        assert (path / "notes.md").read_text() == (path / "runs" / "1" / "log").read_text() == "mine"
        assert (path / "link").is_symlink()
        folder(path, "old")

    assert at_every_step(lambda: folder(path, "new"), look) > 5
    assert seen == {"old", "new"}
    assert left(tmp_path) == []


@posix
def test_a_file_and_its_weights_change_together_at_every_step(tmp_path: Path, system: str):
    path = tmp_path / "m.onnx"

    def write(weights: str) -> None:
        name = f"m.onnx.{hashlib.sha256(weights.encode()).hexdigest()[:16]}.data"
        with written_with_data(path, name, overwrite=True) as draft:
            (draft.parent / name).write_text(weights)
            draft.write_text(name)

    def look() -> None:
        assert (tmp_path / path.read_text()).read_text() in ("old", "new")
        write("old")

    write("old")
    assert at_every_step(lambda: write("new"), look) > 3
    write("new")
    assert len(data_files(path)) == 1
    assert left(tmp_path) == []


@posix
def test_sabotage_a_folder_removed_before_it_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "split"
    folder(path, "old")

    def careless(draft: Path, target: Path, ours: object) -> None:
        os.rename(target, draft.parent / "gone")
        os.rename(draft, target)

    monkeypatch.setattr("splitfx.ground.files.folders.replace_folder", careless)

    def look() -> None:
        KIND.read_manifest(path)

    with pytest.raises(ExportError, match="there is no folder"):
        at_every_step(lambda: folder(path, "new"), look)


# ---------------------------------------------------------------- drafts of others


@posix
def test_only_drafts_of_killed_writers_are_swept(tmp_path: Path):
    path = tmp_path / "a.txt"
    said, heard = os.pipe()
    pids = []
    for fate in ("lives", "dies"):
        pid = os.fork()
        if pid == 0:
            with draft_of(path) as draft:
                draft.write_text(fate)
                os.write(heard, b".")
                time.sleep(60)
            os._exit(0)
        pids.append(pid)
        assert os.read(said, 1) == b"."
    try:
        assert len(left(tmp_path)) == 2
        sweep(tmp_path)
        assert len(left(tmp_path)) == 2
        os.kill(pids[1], signal.SIGKILL)
        os.waitpid(pids[1], 0)
        sweep(tmp_path)
        (alone,) = left(tmp_path)
        assert (tmp_path / alone / "new" / "a.txt").read_text() == "lives"
    finally:
        os.kill(pids[0], signal.SIGKILL)
        os.waitpid(pids[0], 0)
    file(path, "written")
    assert [one.name for one in tmp_path.iterdir()] == ["a.txt"]


def test_what_only_looks_like_a_draft_stays(tmp_path: Path):
    (tmp_path / ".mine.splitfx").write_text("a file")
    (tmp_path / ".own.splitfx").mkdir()
    (tmp_path / ".own.splitfx" / "mine").write_text("a file")
    (tmp_path / ".begun.splitfx").mkdir()  # by a writer that was killed
    (tmp_path / "mine.splitfx").mkdir()
    file(tmp_path / "a.txt", "new")
    assert {one.name for one in tmp_path.iterdir()} == {".mine.splitfx", ".own.splitfx", "mine.splitfx", "a.txt"}


@posix
def test_writers_whose_drafts_are_swept_before_they_are_locked_begin_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    real, swept = drafts.locked, []

    def lock(number: int) -> bool:
        if len(swept) < 3:  # another process comes by at the worst moment, and takes the draft for a dead one
            swept.append(number)
            monkeypatch.setattr(drafts, "locked", real)
            sweep(tmp_path)
            monkeypatch.setattr(drafts, "locked", lock)
        return real(number)

    monkeypatch.setattr(drafts, "locked", lock)
    file(tmp_path / "a.txt", "new")
    assert len(swept) == 3
    assert [one.name for one in tmp_path.iterdir()] == ["a.txt"]


def test_a_file_that_comes_while_a_folder_is_replaced_is_kept(
    tmp_path: Path, system: str, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "split"
    folder(path, "old")
    real = drafts.exchange

    def late(one: Path, other: Path) -> bool:
        (path / "late.md").write_text("mine")
        return real(one, other)

    monkeypatch.setattr(drafts, "exchange", late)
    folder(path, "new")
    assert (path / "late.md").read_text() == "mine"
    assert KIND.read_manifest(path)["text"] == "new"


# ---------------------------------------------------------------- what must not be replaced


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path: Path, system: str):
    path = tmp_path / "a.txt"

    def write() -> None:
        with written_whole(path) as draft:
            draft.write_text("ours")
            path.write_text("mine")

    with pytest.raises(SplitfxError, match="appeared while it was written"):
        write()
    assert path.read_text() == "mine"
    assert [one.name for one in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("what", ["folder", "file", "empty folder"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_where_a_folder_is_to_be_is_not_replaced(tmp_path: Path, system: str, what: str, overwrite: bool):
    path = tmp_path / "split"
    if what == "empty folder" and overwrite:
        return  # as good as none

    def write() -> None:
        with KIND.written_whole(path, overwrite=overwrite) as draft:
            (draft / "about.json").write_text("{}")
            if what == "file":
                path.write_text("mine")
            else:
                path.mkdir()
            if what == "folder":
                (path / "mine.txt").write_text("mine")

    with pytest.raises(ExportError):
        write()
    assert left(tmp_path) == []
    assert not (path / "about.json").exists()
    if what == "folder":
        assert (path / "mine.txt").read_text() == "mine"


def test_without_overwrite_nothing_goes(tmp_path: Path):
    folder(tmp_path / "split", "old")
    with pytest.raises(ExportError, match="already exists"):
        folder(tmp_path / "split", "new", overwrite=False)
    file(tmp_path / "a.txt", "old")
    with pytest.raises(SplitfxError, match="already exists"):
        file(tmp_path / "a.txt", "new", overwrite=False)
    assert KIND.read_manifest(tmp_path / "split")["text"] == (tmp_path / "a.txt").read_text() == "old"


def test_a_file_of_the_user_under_a_name_that_is_to_be_written_is_not_replaced(tmp_path: Path, system: str):
    path = tmp_path / "split"
    folder(path, "old")
    (path / "more.txt").write_text("mine")
    with pytest.raises(ExportError, match=r"more\.txt would be replaced, and a test did not write it"):
        folder(path, "new", extra=("more.txt",))
    assert (path / "more.txt").read_text() == "mine"
    assert KIND.read_manifest(path)["text"] == "old"
    assert left(tmp_path) == []


def test_a_manifest_cannot_name_files_elsewhere(tmp_path: Path):
    path = tmp_path / "split"
    folder(path, "old")
    (tmp_path / "outside").write_text("mine")
    (path / "sub").mkdir()
    (path / "sub" / "inner").write_text("mine")
    about = {"format": 1, "kind": "a test", "bytes": {"../outside": 1, "sub/inner": 1, "..": 1, "": 1, ".": 1}}
    (path / "about.json").write_text(json.dumps(about))
    for name in ("a.txt", "b.txt", "only-old.txt"):
        (path / name).unlink()
    folder(path, "new")
    assert (tmp_path / "outside").read_text() == (path / "sub" / "inner").read_text() == "mine"


# ---------------------------------------------------------------- links, pipes, modes


def test_a_link_is_followed_and_stays(tmp_path: Path, system: str):
    (tmp_path / "far").mkdir()
    file(tmp_path / "far" / "real.txt", "old")
    folder(tmp_path / "far" / "split", "old")
    (tmp_path / "a.txt").symlink_to("far/real.txt")
    (tmp_path / "split").symlink_to("far/split")
    file(tmp_path / "a.txt", "new")
    folder(tmp_path / "split", "new")
    assert (tmp_path / "a.txt").is_symlink()
    assert (tmp_path / "split").is_symlink()
    assert (tmp_path / "far" / "real.txt").read_text() == "new"
    assert KIND.read_manifest(tmp_path / "far" / "split")["text"] == "new"
    with pytest.raises(SplitfxError, match="already exists"):
        check_target(tmp_path / "a.txt", overwrite=False, error=SplitfxError)


def test_links_that_lead_nowhere(tmp_path: Path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("no/such/folder/file")
    for name in ("loop", "dangling"):
        with pytest.raises(SplitfxError):
            file(tmp_path / name, "new")
        with pytest.raises(SplitfxError):
            folder(tmp_path / name, "new")
        assert (tmp_path / name).is_symlink()


def test_weights_are_not_left_behind_a_link(tmp_path: Path):
    (tmp_path / "m.onnx").symlink_to("real.onnx")
    writing = written_with_data(tmp_path / "m.onnx", "m.onnx.0123456789abcdef.data", overwrite=True)
    with pytest.raises(ExportError, match="give the path it leads to"):
        writing.__enter__()


@posix
def test_a_pipe_or_device_is_not_replaced(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path(os.devnull)):
        with pytest.raises(SplitfxError, match="no file but a device or a pipe"):
            file(path, "new")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


@posix
def test_a_file_keeps_its_mode_and_a_long_name_fits(tmp_path: Path):
    path = tmp_path / ("ä" * 120 + ".txt")
    file(path, "old", overwrite=False)
    path.chmod(0o600)
    file(path, "new")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text() == "new"


def test_weights_are_as_before_when_the_model_cannot_be_written(tmp_path: Path):
    path, name = tmp_path / "m.onnx", "m.onnx.0123456789abcdef.data"

    def write() -> None:
        with written_with_data(path, name, overwrite=False) as draft:
            draft.write_text(name)
            (draft.parent / name).write_text("weights")
            path.write_text("mine")

    with pytest.raises(ExportError, match="appeared"):
        write()
    assert [one.name for one in tmp_path.iterdir()] == ["m.onnx"]
    assert path.read_text() == "mine"
