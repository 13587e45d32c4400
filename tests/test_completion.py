"""`splitfx completion`: the script holds every command and option, and bash completes by it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from splitfx import cli
from splitfx.cli.commands import COMMANDS
from splitfx.cli.commands.completion import SHELLS

BASH = shutil.which("bash")


def script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    pytest.importorskip("shtab")
    assert cli.main(["completion", shell]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("shell", SHELLS)
def test_it_holds_every_command(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = script(shell, capsys)
    assert all(name in text for name in COMMANDS)
    assert all(option in text for option in ("--peak", "--accuracy-drop", "--html", "--overwrite"))


@pytest.mark.skipif(BASH is None, reason="no bash here")
@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("splitfx tra", ["transform"]),
        ("splitfx plan --acc", ["--accuracy-drop"]),
        ("splitfx passes fold", ["fold_batchnorm"]),
        ("splitfx profile net.", ["net.py"]),
        ("splitfx explain sp", ["split"]),
        ("splitfx nothing-like-it", []),
    ],
)
def test_bash_completes(typed: str, offered: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "complete.sh").write_text(script("bash", capsys))
    (tmp_path / "net.py").touch()
    (tmp_path / "split").mkdir()
    ask = (
        "source complete.sh; COMP_WORDS=($1); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); "
        'function_=$(complete -p splitfx | sed "s/.*-F \\([^ ]*\\).*/\\1/"); '
        '$function_ splitfx "${COMP_WORDS[COMP_CWORD]}"; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        [str(BASH), "--norc", "-c", ask, "bash", typed], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert [line.rstrip("/ ") for line in done.stdout.split()] == offered, done.stderr


def test_an_unknown_shell_and_a_missing_package(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["completion", "fisch"])
    assert "Known: bash, zsh" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["completion", "bash"]) == 2
    assert "pip install 'splitfx[completion]'" in capsys.readouterr().err
