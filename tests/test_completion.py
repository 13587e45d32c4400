"""`splitfx completion`: the script holds every command and option, and bash and fish complete by it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from splitfx import cli
from splitfx.cli.commands import COMMANDS
from splitfx.cli.commands.completion import SHELLS

BASH, FISH = shutil.which("bash"), shutil.which("fish")
TYPED = [
    ("splitfx tra", ["transform"]),
    ("splitfx plan --acc", ["--accuracy-drop"]),
    ("splitfx passes fold", ["fold_batchnorm"]),
    ("splitfx profile net.", ["net.py"]),
    ("splitfx explain sp", ["split"]),
    ("splitfx nothing-like-it", []),
]


def script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    pytest.importorskip("shtab")
    assert cli.main(["completion", shell]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("shell", SHELLS)
def test_it_holds_every_command(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = script(shell, capsys)
    assert all(name in text for name in COMMANDS)
    mark = "-l " if shell == "fish" else "--"
    assert all(f"{mark}{option}" in text for option in ("peak", "accuracy-drop", "html", "overwrite"))


@pytest.mark.skipif(BASH is None, reason="no bash here")
@pytest.mark.parametrize(("typed", "offered"), TYPED)
def test_bash_completes(typed: str, offered: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask = (
        "source complete; COMP_WORDS=($1); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); "
        'function_=$(complete -p splitfx | sed "s/.*-F \\([^ ]*\\).*/\\1/"); '
        '$function_ splitfx "${COMP_WORDS[COMP_CWORD]}"; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    lines = answered([str(BASH), "--norc", "-c", ask, "bash", typed], script("bash", capsys), tmp_path)
    assert [line.rstrip("/ ") for line in lines] == offered


@pytest.mark.skipif(FISH is None, reason="no fish here")
@pytest.mark.parametrize(("typed", "offered"), TYPED)
def test_fish_completes(typed: str, offered: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask = "source complete; complete -C $argv[1]"  # a line each: what is offered, a tab, what it is
    lines = answered([str(FISH), "--no-config", "-c", ask, typed], script("fish", capsys), tmp_path)
    assert [line.split("\t")[0].rstrip("/") for line in lines] == offered


def answered(command: list[str], completions: str, folder: Path) -> list[str]:
    """What a shell prints in a folder with a file and a folder to complete."""
    (folder / "complete").write_text(completions)
    (folder / "net.py").touch()
    (folder / "split").mkdir()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert not done.stderr
    return [line for line in done.stdout.splitlines() if line]


def test_an_unknown_shell_and_a_missing_package(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["completion", "fisch"])
    assert "Known: bash, fish, zsh" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["completion", "bash"]) == 2
    assert "pip install 'splitfx[completion]'" in capsys.readouterr().err
