"""`check_onnx`: parity, sabotage, clear refusals; and that no provider stands in for another."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from splitfx.errors import ExportError
from splitfx.export import sessions
from splitfx.export.agreement import difference
from splitfx.export.onnx import export_onnx
from splitfx.export.runtime import check_onnx
from splitfx.frontend.trace import trace

pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")
CUDA_WORKS = not sessions.why_not(sessions.CUDA)
without_cuda = pytest.mark.skipif(CUDA_WORKS, reason="CUDA works here")


@pytest.fixture
def exported(two_inputs, two_inputs_file: Path, tmp_path: Path):
    return two_inputs, Path(shutil.copy(two_inputs_file, tmp_path))


def test_report(exported) -> None:
    graph, path = exported
    graph.train()
    steps: list[str] = []
    report = check_onnx(graph, path, providers=["cpu"], runs=3, progress=steps.append)
    row = report.rows[0]
    assert report.ok
    assert row.verdict == "ok"
    assert graph.training
    assert steps
    assert [one.name for one in row.outputs] == ["logits", "extra_0"]
    assert row.max_rel is not None
    assert row.max_rel < 1e-5
    assert row.median_ms is not None
    assert row.p90_ms is not None
    assert 0 < row.median_ms <= row.p90_ms
    assert row.torch_ms is not None
    assert row.torch_ms > 0
    assert row.peak_bytes is not None or row.peak_why
    assert json.loads(report.to_json())["rows"][0]["verdict"] == "ok"
    lines = str(report).splitlines()
    assert max(map(len, lines)) <= 100
    assert "peak MiB" in str(report)


def test_dynamic_batch_and_inputs_by_name_in_any_order(exported) -> None:
    graph, path = exported
    inputs = {"bias": torch.randn(5, 8), "image": torch.randn(5, 3, 8, 8)}
    assert check_onnx(graph, path, inputs, providers=["cpu"], runs=1).ok


def test_one_changed_weight_is_a_mismatch(exported) -> None:
    graph, path = exported
    with torch.no_grad():
        graph.head.weight[0, 0] += 0.01
    report = check_onnx(graph, path, providers=["cpu"], runs=1)
    assert not report.ok
    assert report.rows[0].verdict.startswith("mismatch: logits")
    assert "NOT ok" in str(report)


@pytest.mark.parametrize("factor", [2.0, 1.001, 0.0])
def test_a_scaled_output_is_a_mismatch(tmp_path: Path, factor: float) -> None:
    graph = trace(nn.Linear(4, 4), torch.randn(1, 4))
    path = export_onnx(graph, tmp_path / "m.onnx")
    with torch.no_grad():
        for one in graph.parameters():
            one *= factor
    assert not check_onnx(graph, path, providers=["cpu"], runs=1).ok


def test_difference_sees_nan_inf_and_small_outputs() -> None:
    one = torch.tensor([1.0, math.nan, math.inf])
    assert difference("y", one, one.clone()).max_abs == 0
    assert difference("y", torch.tensor([1.0, 2.0, math.inf]), one).max_rel == math.inf
    assert difference("y", torch.tensor([1.0, math.nan, -math.inf]), one).max_rel == math.inf
    assert difference("y", torch.tensor([math.nan]), torch.tensor([1.0])).max_rel == math.inf
    assert difference("y", torch.tensor([1.1e-6]), torch.tensor([1e-6])).max_rel == pytest.approx(0.1, rel=1e-3)
    assert difference("y", torch.tensor([1e-9]), torch.tensor([0.0])).max_rel == math.inf


def test_half_precision_parity(tmp_path: Path) -> None:
    graph = trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).half(), torch.randn(1, 3, 8, 8).half())
    path = export_onnx(graph, tmp_path / "m.onnx")
    assert check_onnx(graph, path, providers=["cpu"], runs=1).ok


@without_cuda
def test_cuda_asked_for_and_not_there(exported) -> None:
    graph, path = exported
    report = check_onnx(graph, path, providers=["cuda", "cpu"], runs=1)
    assert not report.ok
    assert [row.verdict.partition(":")[0] for row in report.rows] == ["unavailable", "ok"]
    assert len(report.rows[0].verdict) > len("unavailable: ")
    with pytest.raises(ExportError, match="cuda is required and does not start: .+"):
        check_onnx(graph, path, require="cuda")


@pytest.mark.skipif(not CUDA_WORKS, reason="CUDA does not start here")
def test_cuda_parity(exported) -> None:
    graph, path = exported
    report = check_onnx(graph, path, require="cuda", runs=3)
    assert report.ok
    assert report.rows[0].provider == "cuda"
    assert report.rows[0].peak_bytes is not None


def test_unknown_provider_suggests_the_nearest(exported) -> None:
    with pytest.raises(ExportError, match="Did you mean 'cuda'"):
        check_onnx(*exported, providers=["cudda"])


@pytest.mark.parametrize("size", [0, 10, 500])
def test_truncated_file(exported, size: int) -> None:
    graph, path = exported
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ExportError, match="cannot load") as caught:
        check_onnx(graph, path, providers=["cpu"])
    assert "\n" not in str(caught.value)


def test_missing_file_wrong_shapes_wrong_count(exported, tmp_path: Path) -> None:
    graph, path = exported
    with pytest.raises(ExportError, match="no file"):
        check_onnx(graph, tmp_path / "none.onnx")
    with pytest.raises(ExportError, match="input 'image' of m.onnx is float32 .*given float32"):
        check_onnx(graph, path, (torch.randn(1, 3, 9, 9), torch.randn(1, 8)), providers=["cpu"])
    with pytest.raises(ExportError, match="does not accept these inputs"):
        check_onnx(graph, path, torch.randn(1, 3, 8, 8), providers=["cpu"])
    with pytest.raises(ExportError, match="takes 2 inputs"):
        check_onnx(nn.Identity(), path, torch.randn(1, 3, 8, 8), providers=["cpu"])


def test_a_plain_module_needs_inputs(exported) -> None:
    with pytest.raises(ExportError, match="pass the inputs"):
        check_onnx(nn.Linear(3, 3), exported[1])


def test_session_options() -> None:
    options = sessions.session_options(threads=1)
    assert not options.enable_mem_reuse
    assert not options.enable_mem_pattern
    assert options.intra_op_num_threads == 1


def test_start_failure_names_the_missing_library() -> None:
    log = "[E:onnxruntime] Failed with error: libcurand.so.10: cannot open shared object file: No such"
    assert sessions.start_failure(log) == "the library libcurand.so.10 is missing"


# ---------------------------------------------------------------- files from elsewhere


def endless(path: Path) -> Path:
    """A file that loops about for ever: y = x, added to itself 10**15 times."""
    helper, kinds = onnx.helper, onnx.TensorProto
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Add", ["v", "v"], ["w"])],
        "body",
        [
            helper.make_tensor_value_info("i", kinds.INT64, []),
            helper.make_tensor_value_info("go", kinds.BOOL, []),
            helper.make_tensor_value_info("v", kinds.FLOAT, [4]),
        ],
        [helper.make_tensor_value_info("on", kinds.BOOL, []), helper.make_tensor_value_info("w", kinds.FLOAT, [4])],
    )
    graph = helper.make_graph(
        [helper.make_node("Loop", ["count", "", "x"], ["y"], body=body)],
        "main",
        [helper.make_tensor_value_info("x", kinds.FLOAT, [4])],
        [helper.make_tensor_value_info("y", kinds.FLOAT, [4])],
        [helper.make_tensor("count", kinds.INT64, [], [10**15])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(model, str(path))
    return path


def test_a_file_that_never_ends_is_given_up(tmp_path: Path) -> None:
    path = endless(tmp_path / "m.onnx")
    with pytest.raises(ExportError, match=r"m.onnx is not done within 8 s on cpu, at: .+; pass more seconds"):
        check_onnx(nn.Identity(), path, torch.randn(4), providers=["cpu"], seconds=8)


@pytest.mark.parametrize("seconds", [0, -1, math.nan, math.inf, "3"])
def test_wrong_seconds(exported, seconds: object) -> None:
    with pytest.raises(ExportError, match="seconds must be a number above 0"):
        check_onnx(*exported, seconds=seconds)  # type: ignore[arg-type]


def test_a_process_that_ends_is_one_line(exported, monkeypatch) -> None:
    monkeypatch.setattr(sessions.sys, "executable", "/bin/false")
    with pytest.raises(ExportError, match="m.onnx: a fresh process ended with code 1"):
        check_onnx(*exported, providers=["cpu"])


def test_no_escape_of_a_file_reaches_the_terminal(tmp_path: Path) -> None:
    graph = trace(nn.Linear(4, 4), torch.randn(1, 4))
    model = onnx.load(export_onnx(graph, tmp_path / "m.onnx"))
    evil = "\x1b]0;owned\x07\ny"
    model.graph.output[0].name = model.graph.node[-1].output[0] = evil
    for entry in model.metadata_props:
        entry.value = json.dumps({"tiles": [evil]})
    onnx.save(model, str(tmp_path / "m.onnx"))
    report = check_onnx(nn.Linear(4, 4), tmp_path / "m.onnx", torch.randn(1, 4), providers=["cpu"], runs=1)
    assert not report.ok
    assert "owned" in str(report)
    assert "\x1b" not in str(report)
    assert "\x07" not in str(report)
