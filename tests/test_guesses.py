"""What people type before they have read anything: each works, or is refused with the word that they meant."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import splitfx
from splitfx import cli
from splitfx.cli.arguments import GUESSED_COMMANDS
from splitfx.compiler import registry
from splitfx.compiler.inline import parse_inputs, parse_pass
from splitfx.errors import PlanError, SplitfxError, UnsupportedError, nearest
from splitfx.frontend.models import load_model
from splitfx.passes import Tile
from splitfx.report.passes import option_texts
from tests.test_cli import exit_code, wrong

NET = """
import torch
from torch import nn

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(1, 8, 3, padding=1)
        self.c = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, image, mask):
        return {"out": self.c(torch.relu(self.a(image) + self.b(mask)))}

class One(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))

def make(width, depth=2):
    return nn.Conv2d(3, width, 3)
"""
INPUT = ("--input", "1x3x16x16")
BOTH = (*INPUT, "--input", "1x1x16x16")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "net.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def done(*words: str) -> None:
    assert exit_code(*words, "--quiet") == 0


def passes_of(folder: str) -> list[dict[str, object]]:
    return [{"name": one.name, **one.to_dict()} for one in splitfx.Plan.load(Path(folder) / "plan.toml").passes]


# ---------------------------------------------------------------- passes


@pytest.mark.parametrize(
    "words",
    [
        ("--pass", "tile budget=64KiB"),
        ("--pass", "tile budget=64 KiB"),
        ("--pass", "tile budget='64 KiB'"),
        ("--pass", "tile", "budget=64KiB"),
        ("--pass", "tile", "budget=64 KiB"),
        ("--pass=tile", "budget=64KiB"),
        ("--pass", "Tile budget=64KiB"),
    ],
)
def test_one_pass_in_many_spellings(words: tuple[str, ...]) -> None:
    done("transform", "net.py:One", *words, *INPUT, "--out", "o", "--no-verify")
    assert [one["budget"] for one in passes_of("o")] in (["64KiB"], ["64 KiB"])


def test_options_go_to_the_pass_that_they_follow() -> None:
    found = cli._joined(
        ["x", "--pass", "group", "factors=2", "fusion=keep", "--pass", "tile", "rows=8", "--set", "a=1"]
    )
    assert found == ["x", "--pass", "group factors=2 fusion=keep", "--pass", "tile rows=8", "--set", "a=1"]
    assert cli._joined(["a=1", "--set", "b=2"]) == ["a=1", "--set", "b=2"]


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("--pass", "fold"), "Did you mean 'fold_batchnorm'?"),
        (("--pass", "fold,tile"), "write one --pass for each, in order"),
        (("--pass", "tile", "8"), "A pass and its options are one word"),
        (("--plan", "tile"), "A pass by its name is --pass tile"),
        (("--plan", "a_folder"), "a_folder/plan.toml"),
    ],
)
def test_a_pass_that_is_meant(words: tuple[str, ...], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("a_folder").mkdir()
    assert hint in wrong(capsys, "transform", "net.py:One", *words, *INPUT, "--out", "o")


def test_every_option_of_every_pass_says_what_it_does() -> None:
    silent = [
        f"{name}.{option}"
        for name, cls in registry.all().items()
        for option in (field.name for field in dataclasses.fields(cls))
        if not option_texts(cls).get(option)
    ]
    assert silent == []


def test_python_s_name_of_a_pass_is_known() -> None:
    assert parse_pass("Tile rows=8") == Tile(rows=8)
    with pytest.raises(PlanError, match="Did you mean 'tile'"):
        registry.get("til")


def test_a_word_that_is_begun() -> None:
    assert nearest("fold", ["tile", "fold_batchnorm"]) == " Did you mean 'fold_batchnorm'?"
    assert nearest("fo", ["tile", "fold_batchnorm"]) == ""
    assert nearest("fold", ["fold_batchnorm", "fold_identity"]) == ""


# ---------------------------------------------------------------- inputs


def test_inputs_by_name_in_any_order() -> None:
    named = ("--input", "mask=1x1x16x16", "--input", "image=1x3x16x16")
    done("transform", "net.py:Two", "--pass", "tile rows=8", *named, "--out", "o")
    done("transform", "net.py:Two", "--pass", "tile rows=8", *BOTH, "--out", "p")
    assert (Path("o/plan.toml")).read_text() == Path("p/plan.toml").read_text()


@pytest.mark.parametrize(
    ("inputs", "hint"),
    [
        (["image=1x3x16x16", "maks=1x1x16x16"], "forward of Two has no such input. Did you mean 'mask'?"),
        (["image=1x3x16x16", "1x1x16x16"], "give every input by its name"),
        (["mask=1x1x16x16"], "name image too, which come before the others in forward"),
        (["mask=1x1x16x16", "mask=1x1x16x16"], "each name once"),
        (["1x3x16x16,1x1x16x16"], "give each input by an --input of its own"),
    ],
)
def test_what_are_no_inputs(inputs: list[str], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [word for one in inputs for word in ("--input", one)]
    assert hint in wrong(capsys, "profile", "net.py:Two", *words)


def test_a_shape_as_python_writes_it() -> None:
    assert parse_inputs(["(1, 3, 16, 16)"]) == parse_inputs(["1,3,16,16"]) == ([], [((1, 3, 16, 16), "float32")])


# ---------------------------------------------------------------- models and folders


def test_a_saved_split_is_a_model() -> None:
    done("transform", "net.py:One", "--pass", "drop_identity", *INPUT, "--out", "s")
    done("transform", "s", "--pass", "tile rows=8", "--out", "t")
    assert [one["name"] for one in passes_of("t")] == ["drop_identity", "tile"]
    done("compare", "s", "t")
    done("compare", "net.py:One", "t")
    done("diff", "s", "t")
    done("inspect", "t", "--html", "t.html")


def test_a_model_has_a_page_too() -> None:
    done("inspect", "net.py:One", *INPUT, "--html", "a.html", "--svg", "a.svg")
    assert "no pass has run" in Path("a.html").read_text()


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("inspect", "s"), "give --html FILE for the page"),
        (("inspect", "s", "--svg", "a.png"), "its name ends in .svg"),
        (("compare", "s", "net.py:One"), "the model comes first: splitfx compare net.py:One s"),
        (("compare", "s", "typo"), "there is no folder typo"),
        (("profile", "net.py:make", *INPUT), "net.py:make needs width: name a function"),
        (("train", "s"), "Did you mean 'finetune'?"),
        (("optimize", "s"), "Did you mean 'plan'?"),
        (("visualize", "s"), "Did you mean 'inspect'?"),
    ],
)
def test_what_is_meant_is_said(words: tuple[str, ...], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    done("transform", "net.py:One", "--pass", "tile rows=8", *INPUT, "--out", "s", "--no-verify")
    capsys.readouterr()
    assert hint in wrong(capsys, *words)
    assert not Path("a.png").exists()


def test_the_guessed_commands_are_commands() -> None:
    assert set(GUESSED_COMMANDS.values()) <= set(cli.COMMANDS)
    assert not set(GUESSED_COMMANDS) & set(cli.COMMANDS)


def test_a_folder_of_transformers(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
    model = transformers.ResNetForImageClassification(config).eval()
    model.save_pretrained(folder / "hf")
    again = load_model("hf")
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(again(image).logits, model(image).logits)
    done("transform", "hf", "--pass", "tile rows=8", "--input", "1x3x32x32", "--out", "o")
    (folder / "hf" / "model.safetensors").unlink()
    with pytest.raises(UnsupportedError, match="cannot be loaded as a model of transformers"):
        load_model("hf")
    (folder / "hf" / "config.json").write_text(json.dumps({"architectures": ["Trainer"]}))
    with pytest.raises(UnsupportedError, match="cannot be loaded as a model of transformers"):
        load_model("hf")


# ---------------------------------------------------------------- what is said


def test_equal_outputs_are_called_equal() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    same = splitfx.compare(model, splitfx.trace(model, (1, 3, 8, 8)))
    assert "the outputs are equal, bit by bit" in str(same)


def test_a_plan_that_cannot_be_had_says_so() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)).eval()
    text = str(splitfx.plan(model, (1, 3, 8, 8), peak="0.01x"))
    assert "no plan keeps it" in text
    assert "the least is" in text
    none = splitfx.plan(model, (1, 3, 8, 8), macs="0.1x")
    with pytest.raises(SplitfxError, match="no plan was found for"):
        _ = none.best
    assert "no plan was found: nothing that was tried changes" in str(none)


def test_layers_that_only_one_has() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)).eval()
    text = str(splitfx.diff(model, splitfx.transform(model, Tile(rows=4), (1, 3, 8, 8), verify=False)))
    assert "the outputs of 1 layer that both have are the same but for rounding" in text
    assert "2 layers in the first only: 0, 1" in text
    named = nn.Sequential()
    named.add_module("other", nn.Conv2d(3, 8, 3, padding=1))
    assert "no layer stands in both" in str(splitfx.diff(model, named.eval(), (1, 3, 8, 8)))
