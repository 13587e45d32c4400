"""What `export_onnx` writes, refuses and leaves alone. What the file computes is in test_runtime.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from splitfx import __version__, transform
from splitfx.errors import ExportError
from splitfx.export.data_files import data_files
from splitfx.export.onnx import FOLDED, LAYER, OPSETS, export_onnx
from splitfx.frontend.trace import trace
from splitfx.passes import DropIdentity, FoldBatchNorm

onnx = pytest.importorskip("onnx")


def shapes(values) -> dict[str, list[object]]:
    return {one.name: [d.dim_param or d.dim_value for d in one.type.tensor_type.shape.dim] for one in values}


def test_names_and_dynamic_batch(two_inputs, tmp_path: Path) -> None:
    graph = onnx.load(export_onnx(two_inputs, tmp_path / "m.onnx")).graph
    assert shapes(graph.input) == {"image": ["batch", 3, 8, 8], "bias": ["batch", 8]}
    assert shapes(graph.output) == {"logits": ["batch", 4], "extra_0": ["batch", 8]}


def test_fixed_batch_on_request_has_the_traced_size(two_inputs, tmp_path: Path) -> None:
    graph = onnx.load(export_onnx(two_inputs, tmp_path / "m.onnx", dynamic_batch=False)).graph
    assert shapes(graph.input)["image"] == [1, 3, 8, 8]


class FixedBatch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(2, -1) + torch.ones(2, 12)


def test_a_graph_with_a_fixed_batch_warns_or_refuses(tmp_path: Path) -> None:
    graph = trace(FixedBatch(), torch.randn(2, 3, 4))
    with pytest.raises(ExportError, match="batch cannot be dynamic"):
        export_onnx(graph, tmp_path / "m.onnx", dynamic_batch=True)
    assert list(tmp_path.iterdir()) == []
    with pytest.warns(UserWarning, match="fixed batch size") as said:
        export_onnx(graph, tmp_path / "m.onnx")
    assert said[0].filename == __file__  # the caller's line; the command line shows its own warnings alone
    assert shapes(onnx.load(tmp_path / "m.onnx").graph.input)["x"] == [2, 3, 4]


def test_file_holds_layers_and_no_local_paths(two_inputs, tmp_path: Path) -> None:
    path = export_onnx(two_inputs, tmp_path / "m.onnx")
    written = path.read_bytes()
    for forbidden in (
        b".py",
        b"site-packages",
        b"stack_trace",
        str(tmp_path).encode(),
        str(Path(__file__).parent).encode(),
    ):
        assert forbidden not in written
    layers = {(p.key, p.value) for node in onnx.load(path).graph.node for p in node.metadata_props}
    assert {(LAYER, "features.0"), (FOLDED, "features.1"), (LAYER, "head")} <= layers


def test_record_of_where_the_file_comes_from(two_inputs, tmp_path: Path) -> None:
    model = onnx.load(export_onnx(two_inputs, tmp_path / "m.onnx"))
    props = model.metadata_props
    record = json.loads({one.key: one.value for one in props}["splitfx"])
    assert record["model"] == "TwoInputs"
    assert record["batch"] == "dynamic"
    assert record["figures"]["params"] == sum(p.numel() for p in two_inputs.parameters())
    assert model.doc_string.startswith("TwoInputs on ")
    assert "as it was traced" in model.doc_string


class Norms(nn.Module):
    """One norm behind its convolution, and one that reads what another layer reads too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.bn2, self.conv2 = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn1(self.conv1(x)).relu()
        return self.conv2(self.bn2(x) + x)


@pytest.mark.parametrize("fold", [False, True], ids=["as traced", "folded"])
def test_every_layer_keeps_its_name(fold: bool, tmp_path: Path) -> None:
    """A convolution with a batch norm in it is still the convolution, whoever folded it."""
    split = transform(Norms().eval(), [FoldBatchNorm()] if fold else [DropIdentity()], torch.randn(1, 3, 8, 8))
    file = onnx.load(export_onnx(split, tmp_path / "m.onnx"))
    named = [node.name for node in file.graph.node]
    assert [n for n in named if "Conv" in n or "Norm" in n] == ["conv1/Conv", "bn2/BatchNormalization", "conv2/Conv"]
    first = {prop.key: prop.value for prop in file.graph.node[0].metadata_props}
    assert first[LAYER] == "conv1"
    assert first.get(FOLDED) == (None if fold else "bn1")
    record = json.loads({one.key: one.value for one in file.metadata_props}["splitfx"])
    assert ("fold_batchnorm" if fold else "drop_identity") in record["plan"]
    assert record["splitfx"] == __version__
    assert record["figures"]["macs"] == 1 * 6 * 6 * 8 * (27 + 4)


def test_the_split_is_not_changed(two_inputs, tmp_path: Path) -> None:
    two_inputs.train()
    two_inputs.get_submodule("features.1").eval()  # a frozen batch norm stays frozen
    flags = {name: one.training for name, one in two_inputs.named_modules()}
    state = {key: one.clone() for key, one in two_inputs.state_dict().items()}
    metas = [dict(node.meta) for node in two_inputs.graph.nodes]
    export_onnx(two_inputs, tmp_path / "m.onnx")
    assert {name: one.training for name, one in two_inputs.named_modules()} == flags
    assert all(torch.equal(one, state[key]) for key, one in two_inputs.state_dict().items())
    assert [dict(node.meta) for node in two_inputs.graph.nodes] == metas


@pytest.mark.parametrize("opset", [OPSETS[0], OPSETS[-1]])
def test_ends_of_the_opset_range(two_inputs, tmp_path: Path, opset: int) -> None:
    model = onnx.load(export_onnx(two_inputs, tmp_path / "m.onnx", opset=opset))
    assert [one.version for one in model.opset_import if one.domain == ""] == [opset]


@pytest.mark.parametrize("opset", [17, 99, "20", True])
def test_wrong_opset_names_the_range(two_inputs, tmp_path: Path, opset: object) -> None:
    with pytest.raises(ExportError, match="18 to 25"):
        export_onnx(two_inputs, tmp_path / "m.onnx", opset=opset)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_external_data_is_found_beside_the_file(tmp_path: Path) -> None:
    graph = trace(nn.Linear(64, 64), torch.randn(1, 64))
    export_onnx(graph, tmp_path / "m.onnx", external_data=True)
    assert {tmp_path / "m.onnx", *data_files(tmp_path / "m.onnx")} == set(tmp_path.iterdir())
    assert len(data_files(tmp_path / "m.onnx")) == 1
    onnx.checker.check_model(str(tmp_path / "m.onnx"))
    with pytest.raises(ExportError, match="already exists"):
        export_onnx(graph, tmp_path / "m.onnx", external_data=True)


def test_an_existing_file_is_kept_unless_told(two_inputs, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_text("mine")
    with pytest.raises(ExportError, match="already exists"):
        export_onnx(two_inputs, path)
    assert path.read_text() == "mine"
    export_onnx(two_inputs, path, overwrite=True)
    onnx.checker.check_model(str(path))


def test_a_missing_folder_and_a_folder_as_path(two_inputs, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="does not exist"):
        export_onnx(two_inputs, tmp_path / "no" / "m.onnx")
    with pytest.raises(ExportError, match="folder"):
        export_onnx(two_inputs, tmp_path)


def test_a_failing_checker_leaves_nothing_behind(two_inputs, tmp_path: Path, monkeypatch) -> None:
    def refuse(path: str) -> None:
        raise onnx.checker.ValidationError("no such operator\ndetails")

    monkeypatch.setattr(onnx.checker, "check_model", refuse)
    with pytest.raises(ExportError, match="no such operator$"):
        export_onnx(two_inputs, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


class NoOnnxForm(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eigvals(x).real


def test_an_operation_without_onnx_form_is_named_with_its_layer(tmp_path: Path) -> None:
    graph = trace(nn.Sequential(nn.ReLU(), NoOnnxForm()), torch.randn(2, 3, 3))
    with pytest.raises(ExportError, match="at 1: .*eig"):
        export_onnx(graph, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_plain_module_needs_example_inputs(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="example_inputs"):
        export_onnx(nn.Linear(3, 3), tmp_path / "m.onnx")
    export_onnx(nn.Linear(3, 3), tmp_path / "m.onnx", example_inputs=torch.randn(1, 3))
    assert shapes(onnx.load(tmp_path / "m.onnx").graph.output) == {"output": ["batch", 3]}


def test_half_precision(tmp_path: Path) -> None:
    graph = trace(nn.Conv2d(3, 4, 3).half(), torch.randn(1, 3, 8, 8).half())
    model = onnx.load(export_onnx(graph, tmp_path / "m.onnx"))
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
