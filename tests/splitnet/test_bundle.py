"""ONNX files of a tree: parity, the manifest, some groups alone, and folders that are damaged, newer or foreign."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

import splitfx
from splitfx import cli, splitnet
from splitfx.errors import ExportError, UnsupportedError
from splitfx.export.bundles import branches as writing
from splitfx.export.bundles.branches import PARITY, export_branches
from splitfx.export.bundles.branches_runner import KIND, Branches
from splitfx.ir.graph import copy_graph
from splitfx.passes import SplitNet
from splitfx.splitnet.tree import MERGE, STEM, Tree
from tests.splitnet.carved import NESTED, Chain, carved, image, off, wide

pytest.importorskip("onnxruntime")
X = image(2).float()


@pytest.fixture(scope="module")
def split() -> fx.GraphModule:
    """In float32, as it is exported; ragged groups."""
    return carved(Chain(), {"stage*": 2, "fc": 2}, ragged=True)


@pytest.fixture(scope="module")
def folder(split: fx.GraphModule, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_branches(split, tmp_path_factory.mktemp("bundle") / "branches")


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "branches"))


def test_the_files_give_what_the_model_gives(split: fx.GraphModule, folder: Path) -> None:
    branches = Branches(folder)
    for x in (X, image(5).float()):  # the batch is free
        assert off(branches.run(x), split(x)) <= PARITY
    assert "branch 1" in str(branches)


def test_the_manifest_says_what_the_parts_are(split: fx.GraphModule, folder: Path) -> None:
    about, tree = json.loads((folder / KIND.manifest).read_text()), Tree(split)
    assert (about["format"], about["inputs"]) == (1, list(tree.inputs))
    assert about["classes"] == [list(own) for own in tree.classes]
    assert [p["name"] for p in about["parts"]] == [STEM, "branch 0", "branch 1", MERGE]
    assert sum(p["macs"] for p in about["parts"]) == splitfx.profile(split, X).macs
    assert sum(p["params"] for p in about["parts"]) == sum(p.numel() for p in split.parameters())
    assert {p.name for p in folder.iterdir()} == {KIND.manifest, *(p["file"] for p in about["parts"])}
    assert str(folder.parent) not in (folder / KIND.manifest).read_text()


def test_some_groups_need_only_their_own_files(split: fx.GraphModule, copied: Path) -> None:
    (copied / "branch-0.onnx").unlink()
    (copied / "merge.onnx").unlink()
    second = Branches(copied, groups=[1])
    assert list(second.pieces(X)) == [1]
    assert off(second.pieces(X)[1], split(X)[:, list(second.classes[1])]) <= PARITY
    with pytest.raises(ExportError, match="only groups \\[1\\] are open: call pieces"):
        second.run(X)
    with pytest.raises(ExportError, match="branch-0.onnx is missing: copy the file of branch 0"):
        Branches(copied)
    with pytest.raises(ExportError, match="the groups of .* are 0 to 1; asked for \\[2\\]"):
        Branches(copied, groups=[2])


def test_sabotage_pieces_that_are_swapped_in_the_manifest(copied: Path) -> None:
    def swap(about: dict[str, Any]) -> None:
        first, second = about["parts"][1:3]
        first["outputs"], second["outputs"] = second["outputs"], first["outputs"]

    edit(copied, swap)
    with pytest.raises(
        ExportError, match="'fc_branch0' of merge.onnx is float32 \\[batch, 5\\]; given float32 \\[2, 2\\]"
    ):
        Branches(copied).run(X)


def test_sabotage_a_wrong_file_is_not_written(
    split: fx.GraphModule, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = writing.export_onnx

    def rolled(graph: fx.GraphModule, path: Path, **options: Any) -> Any:
        if path.name != "branch-1.onnx":
            return shutil.copy(folder / path.name, path)  # exporting is slow
        graph = copy_graph(graph)
        with torch.no_grad():
            for name, tensor in graph.named_parameters():
                tensor.copy_(tensor.roll(1, 0) if name.startswith("fc") else tensor)
        return right(graph, path, **options)

    monkeypatch.setattr(writing, "export_onnx", rolled)
    with pytest.raises(ExportError, match="the written files are off by .* on cpu; 1e-04 allowed"):
        export_branches(split, tmp_path / "branches")
    assert not list(tmp_path.iterdir())


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    about = json.loads((folder / KIND.manifest).read_text())
    change(about)
    (folder / KIND.manifest).write_text(json.dumps(about))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a: a.update(format=2), "has format 2; this splitfx reads up to 1. Install a newer splitfx"),
        (lambda a: a.update(kind="a bundle"), "is not the manifest of a folder that export_branches wrote"),
        (lambda a: a.update(format="1"), "is not the manifest of a folder that export_branches wrote"),
        (lambda a: a.pop("classes"), "is damaged: object missing required field `classes`"),
        (lambda a: a.update(classes=[3, 4]), "is damaged: see classes"),
        (lambda a: a["parts"].pop(), "is damaged: it names no one part that merges"),
        (lambda a: a["parts"][0].pop("inputs"), r"is damaged: see parts\[0\]: object missing required field `inputs`"),
        (lambda a: a["parts"].__setitem__(0, 3), r"is damaged: see parts\[0\]: expected `object`, got `int`"),
        (lambda a: a.update(inputs=[{}]), "is damaged: see inputs"),
        (lambda a: a.update(arguments=[["x"]]), "is damaged: see arguments"),
        (lambda a: a["parts"][1].update(groups=[[0]]), r"see parts\[1\].groups\[0\]: expected `int`"),
        (lambda a: a["parts"][1].update(groups=["0"]), r"see parts\[1\].groups\[0\]: expected `int`"),
        (lambda a: a["parts"][1].update(groups=[]), "is damaged: merge reads|is damaged: .* which no part"),
        (lambda a: a["parts"][1].update(groups=[7]), "is damaged: see parts: there are"),
        (lambda a: a["classes"][0].append(0), "is damaged: see classes: not every class is in one group"),
        (lambda a: a["parts"][1]["outputs"].append("more"), "branch-0.onnx gives other values than it says"),
        (lambda a: a["parts"][1].update(file="../elsewhere.onnx"), "is no file of this folder"),
        (lambda a: a["parts"][1].update(bytes=7), "branch-0.onnx is damaged: [0-9]+ bytes instead of 7"),
        (lambda a: a["parts"][1].update(sha256="0"), "branch-0.onnx is damaged or of another export"),
        (lambda a: a["parts"][1].update(inputs=["x", "x"]), "branch-0.onnx takes 1 inputs|reads"),
        (lambda a: a["parts"][1].update(inputs=["y"]), "is damaged: branch 0 reads 'y', which no part"),
        (lambda a: a["parts"][1].update(outputs=[]), "is damaged"),
    ],
)
def test_a_manifest_that_is_damaged_newer_or_foreign(copied: Path, change: Callable[[Any], Any], said: str) -> None:
    edit(copied, change)
    with pytest.raises(ExportError, match=said):
        Branches(copied).run(X)


def test_files_that_are_damaged(copied: Path) -> None:
    whole = (copied / "branch-1.onnx").read_bytes()
    (copied / "branch-1.onnx").write_bytes(whole[:-9])
    with pytest.raises(ExportError, match="branch-1.onnx is damaged: .* bytes instead of"):
        Branches(copied)
    (copied / "branch-1.onnx").write_bytes(whole[:-9] + b"somewhere")
    with pytest.raises(ExportError, match="branch-1.onnx is damaged or of another export"):
        Branches(copied)
    (copied / KIND.manifest).write_text("{")
    with pytest.raises(ExportError, match="branches.json is not readable JSON"):
        Branches(copied)
    (copied / KIND.manifest).unlink()
    with pytest.raises(ExportError, match="is not a folder that export_branches wrote"):
        Branches(copied)


def test_inputs_that_do_not_fit(folder: Path) -> None:
    branches = Branches(folder)
    with pytest.raises(ExportError, match="the model takes 1 inputs \\(x\\); 2 given"):
        branches.run(X, X)
    with pytest.raises(ExportError, match="stem.onnx is float32"):
        branches.run(X.double())


def test_a_manifest_of_somebody_else_s_is_not_replaced(split: fx.GraphModule, tmp_path: Path) -> None:
    (tmp_path / KIND.manifest).write_text('{"name": "my web app", "format": 1}')
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(ExportError, match="is no folder of export_branches; it is not replaced"):
        export_branches(split, tmp_path, overwrite=True)
    assert (tmp_path / "precious.txt").read_text() == "mine"


class Two(nn.Module):
    """Two inputs, one of them a dict: the order of keywords and keys says nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.body = nn.Conv2d(1, 4, 1), nn.Conv2d(1, 4, 1), nn.Conv2d(4, 8, 3)
        self.fc = nn.Linear(8, 4)

    def forward(self, first: torch.Tensor, rest: dict[str, torch.Tensor]) -> torch.Tensor:
        x = torch.relu(self.a(first) + self.b(rest["p"]) - 2 * self.b(rest["q"]))
        return self.fc(torch.relu(self.body(x)).mean((2, 3)))


def test_keywords_and_keys_in_any_order(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, p, q = (torch.randn(2, 1, 6, 6) for _ in range(3))
    graph = splitfx.trace(Two().eval(), (x, {"p": p, "q": q}))
    split = splitfx.transform(graph, SplitNet(levels={"body": 2, "fc": 2}, source="random", lowering="branches"))
    wanted = split(x, {"p": p, "q": q})
    tree, branches = Tree(split), Branches(export_branches(split, tmp_path / "branches"))
    for run in (tree, branches.run):
        assert off(run(x, {"q": q, "p": p}), wanted) <= PARITY
        assert off(run(rest={"q": q, "p": p}, first=x), wanted) <= PARITY
        assert off(run(x, {"p": q, "q": p}), wanted) > 0.01
    for wrong in (lambda: tree(x), lambda: tree(x, {"p": p}), lambda: tree(x, {"p": p, "q": q}, first=x)):
        with pytest.raises(UnsupportedError, match=r"takes 3 inputs \(first, rest\['p'\], rest\['q'\]\)"):
            wrong()


def test_places_that_cannot_be_written(split: fx.GraphModule, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="already exists; choose another name or pass overwrite=True"):
        export_branches(split, folder)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("mine")
    with pytest.raises(ExportError, match="is no folder of export_branches; it is not replaced"):
        export_branches(split, tmp_path / "mine", overwrite=True)
    with pytest.raises(ExportError, match="does not exist; create it first"):
        export_branches(split, tmp_path / "not" / "there")
    with pytest.raises(UnsupportedError, match="SplitNet carved"):
        export_branches(splitfx.trace(Chain(), X), tmp_path / "new")


def test_on_the_command_line(split: fx.GraphModule, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    splitfx.save(split, tmp_path / "split")
    words = ["export", str(tmp_path / "split"), "--branches", str(tmp_path / "branches"), "--quiet"]
    assert cli.main([*words, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    names = {"stem.onnx", "branch-0.onnx", "branch-1.onnx", "merge.onnx", KIND.manifest}
    assert {Path(one).name for one in made["files"]} == names
    assert off(splitnet.Branches(made["branches"]).run(X), split(X)) <= PARITY
    assert cli.main(words) == 2
    assert "already exists" in capsys.readouterr().err
    assert cli.main([*words, "--overwrite"]) == 0
    assert "branch 1" in capsys.readouterr().out


def test_a_failed_export_leaves_the_old_folder(
    split: fx.GraphModule, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {p.name: p.read_bytes() for p in copied.iterdir()}

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "export_onnx", full)
    with pytest.raises(ExportError, match="cannot be written: No space left on device"):
        export_branches(split, copied, overwrite=True)
    assert {p.name: p.read_bytes() for p in copied.iterdir()} == before
    assert list(copied.parent.iterdir()) == [copied]


@pytest.mark.slow
def test_a_hierarchy_as_files_and_as_one_file(tmp_path: Path) -> None:
    split = carved(wide().float(), NESTED, boundary="grouped")
    branches = Branches(export_branches(split, tmp_path / "branches"))
    assert len(branches.parts) == 8
    assert off(branches.run(X), split(X)) <= PARITY
    again = export_branches(split, tmp_path / "branches", overwrite=True, dynamic_batch=False)
    with pytest.raises(ExportError, match="given float32 \\[5"):
        Branches(again).run(image(5).float())
    whole = splitfx.export_onnx(split, tmp_path / "whole.onnx")
    report = splitfx.check_onnx(split, whole, providers=("cpu",), runs=1)
    assert report.rows[0].ok
