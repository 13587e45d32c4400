"""The manifests of ONNX folders (export_bundle, export_branches), edited: opened and run."""

from __future__ import annotations

import json
import random
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

import splitfx
from splitfx.export.bundles import branches_runner as branches
from splitfx.export.bundles import submodels as bundle
from tests.fuzz.kind_program import Folder, written
from tests.fuzz.mutate import edited

SAMPLE = 80


def prepare() -> None:
    folders()


@cache
def folders() -> tuple[Folder, Folder]:
    """A folder of each kind, over files of one operation each: what is edited is the manifest."""
    with tempfile.TemporaryDirectory() as place:
        one, two = Path(place) / "bundle", Path(place) / "branches"
        return _bundle(one), _branches(two)


def draw(seed: int, folder: Path) -> str:
    rng = random.Random(seed)
    kind = rng.randrange(2)
    template, name = folders()[kind], ("manifest.json", "branches.json")[kind]
    place = written(template, folder / "parts")
    (place / name).write_text(json.dumps(edited(json.loads(template[name]), rng, folder)))
    x = torch.ones(1, 2)
    if kind == 0:
        opened = splitfx.Bundle(place)
        str(opened)
        assert torch.equal(opened.run(x).outputs[0], x)
        return "accepted"
    found = branches.Branches(place)
    str(found)
    found.run(x)
    found.pieces(x)
    return "accepted"


def _bundle(place: Path) -> Folder:
    place.mkdir()
    rows = []
    for name, macs in (("base", 9), ("sub1", 3)):
        _onnx(place / f"{name}.onnx", "Identity", ["x"], ["y"])
        figures = {"macs": macs, "params": 5, "peak_bytes": 64, "seconds": 0.1, "accuracy": None}
        rows.append({"name": name, "file": f"{name}.onnx", "behind": "", **figures})
    (place / "weights.data").write_bytes(b"12345678")
    about = {
        "format": 1, "kind": bundle.KIND.writer, "model": "Net", "inputs": [[1, 2]],
        "weights": {"file": "weights.data", "bytes": 8}, "provider": "cpu", "threads": 1, "models": rows,
    }  # fmt: skip
    return _held(place, "manifest.json", about)


def _branches(place: Path) -> Folder:
    place.mkdir()
    parts: list[tuple[str, str, list[str], list[str], list[int]]] = [
        ("stem", "Identity", ["x"], ["h"], [0, 1]),
        ("branch 0", "Identity", ["h"], ["a"], [0]),
        ("branch 1", "Neg", ["h"], ["b"], [1]),
        (branches.MERGE, "Concat", ["a", "b"], ["y"], []),
    ]
    rows = []
    for name, op, reads, gives, groups in parts:
        file = f"{name.replace(' ', '-')}.onnx"
        _onnx(place / file, op, reads, gives)
        rows.append({"name": name, "file": file, **branches.fingerprint(place / file), "groups": groups,
                     "inputs": reads, "outputs": gives, "macs": 1, "params": 0})  # fmt: skip
    about = {
        "format": 1, "kind": branches.KIND.writer, "model": "Net", "inputs": ["x"], "arguments": [["x", ""]],
        "classes": [[0, 2], [1, 3]], "parts": rows,
    }  # fmt: skip
    return _held(place, "branches.json", about)


def _held(place: Path, name: str, about: dict[str, Any]) -> Folder:
    (place / name).write_text(json.dumps(about))
    return {one.name: one.read_bytes() for one in place.iterdir()}


def _onnx(path: Path, op: str, reads: list[str], gives: list[str]) -> None:
    from onnx import TensorProto, helper, save

    value = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, None])  # noqa: E731
    options: dict[str, Any] = {"axis": 1} if op == "Concat" else {}
    node = helper.make_node(op, reads, gives, **options)
    graph = helper.make_graph([node], "part", list(map(value, reads)), list(map(value, gives)))
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), str(path))
