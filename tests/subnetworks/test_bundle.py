"""Bundles: one file of weights, every model checked, and a runner that keeps deadlines."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import splitfx
from splitfx.errors import ExportError, UnsupportedError
from splitfx.export.bundles import submodels as bundles
from splitfx.export.data_files import data_files
from splitfx.passes import SubNetworks, Tile
from splitfx.subnetworks.model import SubNetworksGraph
from splitfx.train.data import load_data
from tests import oracle
from tests.subnetworks.networks import small, vgg

pytest.importorskip("onnxruntime")
X = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(5))


def trained(model: Any, x: torch.Tensor, **options: Any) -> SubNetworksGraph:
    """With statistics that training has moved apart where they are a model's own."""
    split = splitfx.transform(model, SubNetworks(**options), x, verify=False)
    assert isinstance(split, SubNetworksGraph)
    split.train()
    with torch.no_grad():
        for _ in range(2):
            split.forward_all(torch.randn(8, *x.shape[1:]) + 0.5)
    return split.eval()  # type: ignore[return-value]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[SubNetworksGraph, Path]:
    torch.manual_seed(0)
    split = trained(small(), X, cuts=(1, 3), statistics="private")
    digits = load_data("digits", (1, 16, 16))
    folder = splitfx.export_bundle(split, tmp_path_factory.mktemp("one") / "bundle", val=digits.val, runs=2)
    return split, folder


def external(path: Path) -> dict[str, tuple[int, int, tuple[int, ...]]]:
    """Initializer -> where its data lies in the file beside, and its sizes."""
    import onnx

    found = {}
    for one in onnx.load(str(path), load_external_data=False).graph.initializer:
        place = {entry.key: entry.value for entry in one.external_data}
        if place:
            assert place["location"] == bundles.WEIGHTS
            found[one.name] = (int(place["offset"]), int(place["length"]), tuple(one.dims))
    return found


def test_every_weight_lies_in_the_one_file_once(made: tuple[SubNetworksGraph, Path]) -> None:
    _, folder = made
    files = {name: external(folder / f"{name}.onnx") for name in ("base", "sub0", "sub1")}
    for name in ("sub0", "sub1"):
        common = {
            key for key in files[name] if key in files["base"] and "running" not in key and "step_down" not in key
        }
        assert {"10.weight", "15.weight"} <= common
        assert all(files[name][key] == files["base"][key] for key in common), name
    spans = sorted({(start, length) for places in files.values() for start, length, _ in places.values()})
    assert all(a + n <= b for (a, n), (b, _) in pairwise(spans))  # nothing overlaps
    data = (folder / bundles.WEIGHTS).read_bytes()
    held = [data[start : start + length] for start, length in spans]
    assert len(set(held)) == len(held)
    assert "3.weight" in files["base"]
    assert "3.weight" in files["sub0"]
    assert "3.weight" not in files["sub1"]


def test_every_file_agrees_with_its_model(made: tuple[SubNetworksGraph, Path]) -> None:
    split, folder = made
    for name, model in zip(split.names, (split.base(), split.detach(0), split.detach(1)), strict=True):
        assert splitfx.check_onnx(model, folder / f"{name}.onnx", X, providers=("cpu",), runs=1).ok


def test_the_manifest_says_what_each_model_costs_and_reaches(made: tuple[SubNetworksGraph, Path]) -> None:
    split, folder = made
    about = json.loads((folder / "manifest.json").read_text())
    assert about["weights"] == {"file": "weights.data", "bytes": (folder / "weights.data").stat().st_size}
    for row, figures in zip(about["models"], split.figures(), strict=True):
        assert (row["name"], row["macs"], row["ops"], row["params"], row["peak_bytes"]) == (
            figures.name, figures.macs, figures.ops, figures.params, figures.peak_bytes,
        )  # fmt: skip
        assert row["seconds"] > 0
        assert row["runtime_peak_bytes"] > 0
        assert 0 < row["accuracy"] < 100
    assert str(folder.parent) not in json.dumps(about)


@pytest.mark.parametrize("statistics", ["shared", "private"])
def test_storage_is_base_and_step_downs_and_one_percent(statistics: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    widths = (32, 64, 0, 128, 256, 0, 256, 256, 0)
    split = trained(vgg(widths, 16), torch.zeros(1, 3, 16, 16), cuts=(2, 4), statistics=statistics)
    folder = splitfx.export_bundle(split, tmp_path / "bundle", runs=1)
    alone = splitfx.export_onnx(split.base(), tmp_path / "base.onnx", external_data=True)
    size = lambda *paths: sum(path.stat().st_size for path in paths)  # noqa: E731
    base = size(alone, *data_files(alone))
    state = split.state_dict()
    own = sum(t.numel() * t.element_size() for key, t in state.items() if ".step_down." in key)
    assert size(*folder.iterdir()) <= 1.01 * (base + own)


def test_a_file_that_disagrees_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sabotage: every weight is read from where the first one lies."""
    placed = bundles._Store.placed

    def forgetful(self: Any, tensor: Any) -> Any:
        import onnx_ir as ir

        found = placed(self, tensor)
        if not isinstance(found, ir.ExternalTensor):
            return found
        place = {"shape": found.shape, "name": found.name, "base_dir": found.base_dir}
        return ir.ExternalTensor(bundles.WEIGHTS, 0, found.length, found.dtype, **place)

    monkeypatch.setattr(bundles._Store, "placed", forgetful)
    split = trained(small(), X, cuts=(1,))
    with pytest.raises(ExportError, match=r"base.onnx does not agree with its model on cpu: mismatch"):
        splitfx.export_bundle(split, tmp_path / "bundle", runs=1)
    assert not (tmp_path / "bundle").exists()
    assert not list(tmp_path.iterdir())


def test_what_is_refused(made: tuple[SubNetworksGraph, Path], tmp_path: Path) -> None:
    split, folder = made
    with pytest.raises(ExportError, match="already exists; choose another name or pass overwrite"):
        splitfx.export_bundle(split, folder)
    with pytest.raises(ExportError, match="with the pass 'subnetworks'"):
        splitfx.export_bundle(split.base(), tmp_path / "bundle")
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ExportError, match="is no folder of export_bundle; it is not replaced"):
        splitfx.export_bundle(split, tmp_path, overwrite=True)
    with pytest.raises(ExportError, match="manifest.json is missing"):
        splitfx.Bundle(tmp_path)


def rewritten(folder: Path, change: Callable[[Any], Any]) -> None:
    about = json.loads((folder / "manifest.json").read_text())
    change(about)
    (folder / "manifest.json").write_text(json.dumps(about))


ROWS: tuple[tuple[Callable[[Any], Any], str], ...] = (
    (lambda a: a.update(models=[]), r"see models: expected `array` of length >= 1"),
    (lambda a: a.update(models=[[1]]), r"see models\[0\]: expected `object`, got `array`"),
    (
        lambda a: [a["models"][0].pop(key) for key in ("params", "seconds")],
        r"see models\[0\]: object missing required field `params`",
    ),
    (lambda a: a["models"][0].update(macs="many"), r"see models\[0\].macs: expected `int`, got `str`"),
    (lambda a: a["models"][0].update(macs=None, peak_bytes=True), r"see models\[0\].macs: expected `int`, got `null`"),
    (lambda a: a["models"][0].update(seconds=[1], macs=10**400), "a number of more than 64 bits"),
    (lambda a: a["models"][1].update(accuracy="x"), r"see models\[1\].accuracy: expected `float | null`"),
    (lambda a: a["models"][1].update(accuracy=float("nan")), "a number that is not finite"),
    (lambda a: a["models"][2].update(name=["a"]), r"see models\[2\].name: expected `str`"),
    (lambda a: [row.update(name="q") for row in a["models"]], "two models are named 'q'"),
)


def test_a_damaged_bundle(made: tuple[SubNetworksGraph, Path], tmp_path: Path) -> None:
    faults: tuple[tuple[Callable[[Path], Any], str], ...] = (
        (lambda f: (f / "sub1.onnx").unlink(), "sub1.onnx is missing"),
        (lambda f: (f / "weights.data").write_bytes(b"short"), "weights.data is truncated"),
        (lambda f: (f / "manifest.json").write_text("{"), "is not readable JSON"),
        (lambda f: (f / "manifest.json").write_text("[]"), "not the manifest"),
        (lambda f: (f / "manifest.json").write_text('{"format": 9, "kind": "export_bundle"}'), "has format 9"),
        (lambda f: rewritten(f, lambda a: a["models"][0].update(file="../base.onnx")), "is no file of this folder"),
        (lambda f: rewritten(f, lambda a: a["weights"].update(file="/etc/passwd")), "is no file of this folder"),
        (lambda f: rewritten(f, lambda a: a.pop("models")), "is damaged: object missing required field `models`"),
    )
    for i, (fault, why) in enumerate(faults):
        folder = Path(shutil.copytree(made[1], tmp_path / str(i)))
        fault(folder)
        with pytest.raises(ExportError, match=why):
            splitfx.Bundle(folder)


def test_a_manifest_with_values_of_other_types(made: tuple[SubNetworksGraph, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made[1], tmp_path / "bundle"))
    whole = (folder / "manifest.json").read_text()
    for change, why in ROWS:
        (folder / "manifest.json").write_text(whole)
        rewritten(folder, change)
        with pytest.raises(ExportError, match=f"manifest.json is damaged: {why}") as caught:
            splitfx.Bundle(folder)
        assert "\n" not in str(caught.value)
    (folder / "manifest.json").write_text(whole)
    rewritten(folder, lambda a: [row.update(seconds=None, accuracy=None) for row in a["models"]])
    assert splitfx.Bundle(folder).pick(X) == "base"


# ---------------------------------------------------------------- the runner


def test_each_model_gives_its_own_output(made: tuple[SubNetworksGraph, Path]) -> None:
    split, folder = made
    runner = splitfx.Bundle(folder)
    known = runner.warm_up(X, runs=3)
    assert set(known) == {"base", "sub0", "sub1"}
    wanted = dict(zip(split.names, split.forward_all(X), strict=True))
    for name in known:
        (found,), _ = runner._timed(name, (X,))
        oracle.assert_equal(found, wanted[name].detach())
    best = runner.run(X)
    accuracy = {one.name: one.accuracy for one in runner.models}
    assert accuracy[best.model] == max(accuracy.values())  # type: ignore[type-var]
    assert best.met
    assert "latency here" in str(runner)


def test_the_best_within_a_deadline(made: tuple[SubNetworksGraph, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    runner = splitfx.Bundle(made[1])
    times = {"base": 0.03, "sub0": 0.02, "sub1": 0.01}
    monkeypatch.setattr(runner, "seconds", lambda name, *inputs: times[name])
    ranked = zip(runner.models, (99.0, 98.0, 97.0), strict=True)
    runner.models = tuple(dataclasses.replace(model, accuracy=accuracy) for model, accuracy in ranked)
    assert [runner.pick(X, deadline=d) for d in (1.0, 0.03, 0.025, 0.01)] == ["base", "base", "sub0", "sub1"]
    with pytest.raises(UnsupportedError, match="no model meets a deadline of 5 ms: the fastest is sub1 with 10 ms"):
        runner.pick(X, deadline=0.005, late="refuse")
    answer = runner.run(X, deadline=1e-9)  # answered late, by the fastest
    assert (answer.model, answer.met) == ("sub1", False)
    with pytest.raises(UnsupportedError, match="late is 'refuse' or 'fastest'"):
        runner.pick(X, deadline=1.0, late="never")  # type: ignore[arg-type]


def test_unknown_sizes_want_a_warm_up(made: tuple[SubNetworksGraph, Path]) -> None:
    runner = splitfx.Bundle(made[1])
    with pytest.raises(UnsupportedError, match=r"\[\[1, 1, 16, 16\]\] is not known yet: call warm_up"):
        runner.pick(X, deadline=1.0)


def test_tiled_sub_models_export(tmp_path: Path) -> None:
    split = trained(small(), X, cuts=(1,))
    tiled = splitfx.transform(split.detach(0), Tile(rows=4))
    path = splitfx.export_onnx(tiled, tmp_path / "tiled.onnx")
    assert splitfx.check_onnx(split.detach(0), path, X, providers=("cpu",), runs=1).ok
