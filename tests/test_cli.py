"""The command line: light to start, one line per mistake, exit codes, JSON on stdout alone, nothing
half-written."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from splitfx import cli

TINY = """
import torch
from torch import nn

class Tiny(nn.Sequential):
    def __init__(self):
        first = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
        second = nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)
        third = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
        super().__init__(*first, *second, *third)

def broken():
    raise ValueError("no luck")

number = 3
"""
GROUP = "group factors=1,2 lowering=grouped"


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "tiny.py").write_text(TINY)
    monkeypatch.chdir(tmp_path)
    return "tiny.py:Tiny"


@pytest.fixture
def split(tiny: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["transform", tiny, "--pass", GROUP, "--input", "1x3x8x8", "--out", "split", "--quiet"]) == 0
    capsys.readouterr()
    return "split"


def exit_code(*words: str) -> int:
    """argparse leaves by SystemExit, a command by its return value."""
    try:
        return cli.main(words)
    except SystemExit as stop:
        return int(str(stop.code))


def wrong(capsys: pytest.CaptureFixture[str], *words: str, code: int = 2) -> str:
    """The one line on stderr of a command that fails."""
    assert exit_code(*words, "--quiet") == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("splitfx: error: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize("word", ["--help", "--version"])
def test_help_does_not_import_torch(word: str) -> None:
    call = f"try: cli.main(['{word}'])\nfinally: assert 'torch' not in sys.modules"
    script = f"import sys; from splitfx import cli\n{call}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "splitfx" in done.stdout


def test_python_m_splitfx_lists_the_commands() -> None:
    done = subprocess.run([sys.executable, "-m", "splitfx"], capture_output=True, text=True)
    assert done.returncode == 0
    assert all(name in done.stdout for name in ("profile", "transform", "export", "check", "inspect", "doctor"))


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["profil"], "'profile'"),
        (["passes", "--jsno"], "'--json'"),
        (["plan", "tiny.py:Tiny", "--memory", "64MB"], "Did you mean '--peak'?"),
        (["plan", "tiny.py:Tiny", "--flops=0.5x"], "Did you mean '--macs'?"),
        (["plan", "tiny.py:Tiny", "--epochs", "3"], "Did you mean '--set epochs=N'?"),
        (["profile", "tiny.py:Tiny", "--shape", "1x3x8x8"], "Did you mean '--input'?"),
        (["profile", "tiny.py", "--input", "1x3x8x8"], "Write tiny.py:NAME"),
        (["profile", "tiny.pth", "--input", "1x3x8x8"], "name the model that they are of, with --weights tiny.pth"),
        (["check", "tiny.py", "nowhere"], "tiny.py is a file, not the folder of a saved split"),
        (["profile", "torchvision:resnet81", "--input", "1x3x8x8"], "Did you mean 'resnet"),
        (["profile", "tiny.py:Tinny", "--input", "1x3x8x8"], "'Tiny'"),
        (["profile", "tiny.py:broken", "--input", "1x3x8x8"], "ValueError: no luck at tiny.py:13"),
        (["profile", "tiny.py:number", "--input", "1x3x8x8"], "gives a int, not a torch.nn.Module"),
        (["profile", "nowhere.py:Tiny", "--input", "1x3x8x8"], "no file nowhere.py"),
        (["profile", "nowhere_at_all:Tiny", "--input", "1x3x8x8"], "no module 'nowhere_at_all'"),
        (["profile", "Tiny", "--input", "1x3x8x8"], "torchvision:NAME"),
        (["profile", "tiny.py:Tiny"], "give --input"),
        (["profile", "tiny.py:Tiny", "--input", "3"], "such as 1x3x224x224"),
        (["profile", "tiny.py:Tiny", "--input", "1x3x8x8:flaot32"], "'float32'"),
        (["transform", "tiny.py:Tiny", "--out", "o"], "no plan"),
        (["transform", "tiny.py:Tiny", "--out", "o", "--pass", "gruop factors=2"], "'group'"),
        (["transform", "tiny.py:Tiny", "--out", "o", "--pass", "group factor=2"], "'factors'"),
        (["transform", "tiny.py:Tiny", "--out", "o", "--pass", "group factors=two"], "a list of integers"),
        (["transform", "tiny.py:Tiny", "--out", "o", "--pass", "group factors"], "no option=value"),
        (["transform", "tiny.py:Tiny", "--out", "o", "--pass", GROUP], "no input sizes"),
        (["transform", "tiny.py:Tiny", "--out", "o", "--plan", "none.toml"], "none.toml"),
        (["transform", "tiny.py:Tiny", "--out", "o", "--plan", "p", "--pass", GROUP], "not both"),
        (
            ["transform", "tiny.py:Tiny", "--out", "none/o", "--pass", GROUP, "--input", "1x3x8x8"],
            "does not exist",
        ),
        (
            ["transform", "tiny.py:Tiny", "--out", "tiny.py", "--pass", GROUP, "--input", "1x3x8x8"],
            "--overwrite",
        ),
        (
            [
                "transform",
                "tiny.py:Tiny",
                "--out",
                "o",
                "--pass",
                "group factors=2,2,2",
                "--input",
                "1x3x8x8",
            ],
            "2 blocks",
        ),
        (["transform", "tiny.py:Tiny", "--out", "o", "--pass", GROUP, "--input", "1x4x8x8"], ""),
        (["export", "nowhere", "--onnx", "x.onnx"], "no folder nowhere"),
        (["explain", "nowhere"], "no folder nowhere"),
        (["measure", "tiny.py:Tiny", "--input", "1x3x8x8", "--runs", "0"], "positive"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], hint: str, tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert hint in wrong(capsys, *words)
    assert sorted(p.name for p in Path().iterdir() if p.name != "__pycache__") == ["tiny.py"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("w.safetensors", b""),
        ("w.safetensors", b"cut off"),
        ("w.pt", b""),
        ("w.pt", b"cut off"),
        ("w.txt", b"text"),
    ],
)
def test_bad_weight_files(name: str, content: bytes, tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path(name).write_bytes(content)
    assert name in wrong(capsys, "profile", tiny, "--input", "1x3x8x8", "--weights", name)


def test_weights_that_run_code_are_refused(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(nn.Linear(2, 2), "whole.pt")
    assert "does not unpickle" in wrong(capsys, "profile", tiny, "--input", "1x3x8x8", "--weights", "whole.pt")


def test_weights_of_another_model(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), "other.pt")
    message = wrong(capsys, "profile", tiny, "--input", "1x3x8x8", "--weights", "other.pt")
    assert "0.weight is missing" in message
    assert "more" in message


def test_weights_are_taken(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    from splitfx.frontend.models import load_model

    given = load_model(tiny, seed=5).state_dict()
    torch.save({"state_dict": given}, "w.pt")
    taken = load_model(tiny, "w.pt", seed=1).state_dict()
    assert all(torch.equal(one, taken[key]) for key, one in given.items())


def test_one_seed_gives_one_model(tiny: str) -> None:
    from splitfx.frontend.models import load_model

    first, second, other = (load_model(tiny, seed=s).state_dict()["0.weight"] for s in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_from_model_to_checked_file(split: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", split, "--quiet"]) == 0
    assert "group(factors=[1, 2]" in capsys.readouterr().out
    assert cli.main(["export", split, "--onnx", "split.onnx", "--quiet"]) == 0
    assert cli.main(["check", split, "split.onnx", "--provider", "cpu", "--runs", "1", "--quiet"]) == 0
    assert "ok" in capsys.readouterr().out
    assert "--overwrite" in wrong(capsys, "export", split, "--onnx", "split.onnx")
    assert cli.main(["inspect", split, "--html", "p.html", "--svg", "p.svg", "--quiet"]) == 0
    assert Path("p.svg").read_text().startswith("<svg")


def test_a_file_of_other_weights_fails_the_check(split: str, tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        cli.main(
            [
                "transform",
                tiny,
                "--pass",
                GROUP,
                "--input",
                "1x3x8x8",
                "--out",
                "two",
                "--seed",
                "9",
                "--quiet",
            ]
        )
        == 0
    )
    assert cli.main(["export", "two", "--onnx", "two.onnx", "--quiet"]) == 0
    assert cli.main(["check", split, "two.onnx", "--provider", "cpu", "--runs", "1", "--quiet"]) == 1
    assert "mismatch" in capsys.readouterr().out


def test_required_provider_that_is_not_there(split: str, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("CUDA is here")
    cli.main(["export", split, "--onnx", "split.onnx", "--quiet"])
    capsys.readouterr()
    assert "cuda is required" in wrong(capsys, "check", split, "split.onnx", "--require", "cuda")


def test_an_existing_folder_is_refused_before_work(split: str, tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["transform", "no_such_module:x", "--pass", GROUP, "--input", "1x3x8x8", "--out", split]
    assert "--overwrite" in wrong(capsys, *words)  # the model is not even looked at
    assert cli.main(["transform", tiny, *words[2:], "--overwrite", "--quiet"]) == 0


def test_a_folder_of_others_is_never_replaced(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine").mkdir()
    Path("mine/letter.txt").write_text("dear")
    words = ["transform", tiny, "--pass", GROUP, "--input", "1x3x8x8", "--out", "mine", "--overwrite"]
    assert "is no folder of splitfx.save" in wrong(capsys, *words)
    assert Path("mine/letter.txt").read_text() == "dear"


@pytest.mark.parametrize(
    "words",
    [
        ["passes"],
        ["explain", "split"],
        ["profile", "split"],
        ["profile", "tiny.py:Tiny", "--input", "1x3x8x8"],
        ["measure", "split", "--runs", "1"],
        ["compare", "tiny.py:Tiny", "split"],
    ],
)
def test_json_alone_is_on_stdout(words: list[str], split: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*words, "--json"]) == 0
    json.loads(capsys.readouterr().out)


def test_errors_are_json_too(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", "nowhere", "--json", "--quiet"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "ExportError"


def test_progress_goes_to_stderr_and_quiet_stops_it(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["profile", tiny, "--input", "1x3x8x8"]
    cli.main(words)
    assert "tracing" in capsys.readouterr().err
    cli.main([*words, "--quiet"])
    assert capsys.readouterr().err == ""


def test_input_overrides_the_plan(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    from splitfx import Plan

    plan = 'format = 1\ninput_shape = [1, 3, 64, 64]\n[[pass]]\nname = "group"\nfactors = [1, 2]\n'
    Path("p.toml").write_text(plan)
    assert cli.main(["transform", tiny, "--plan", "p.toml", "--input", "2x3x8x8", "--out", "o", "--quiet"]) == 0
    assert Plan.load("o/plan.toml").input_shape == (2, 3, 8, 8)


def test_ctrl_c_is_130(tiny: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stopped(*args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.COMMANDS["passes"], "run", stopped)
    assert cli.main(["passes"]) == 130
    assert capsys.readouterr().err == "splitfx: stopped\n"


def test_passes_shows_promise_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["passes"]) == 0
    out = capsys.readouterr().out
    assert "promise retrain" in out
    assert 'default "widen"' in out
    assert max(map(len, out.splitlines())) <= 100
