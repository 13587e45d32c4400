"""Measurements: hand-made bytes, the model's mode, devices that are not there."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from torch import nn

from splitfx.errors import UnsupportedError
from splitfx.ground.table import WIDTH
from splitfx.ground.turns import WARM_UP, alternate
from splitfx.report.measuring import measure

MIB = 2**20
measure_module = importlib.import_module("splitfx.report.measuring")  # splitfx.measure is the function
IMAGE = torch.zeros(MIB // 4)  # 1 MiB


def test_bytes_by_hand_on_a_cpu() -> None:
    """Input, one value and the next one: 3 MiB; the in-place ReLU adds nothing, parameters neither."""
    found = measure(nn.Sequential(nn.Sigmoid(), nn.Tanh(), nn.ReLU(inplace=True)), IMAGE, runs=3)
    assert found.peak_bytes == 3 * MIB
    assert found.runs == 3
    assert 0 < found.seconds <= found.p90_seconds


def test_the_inputs_count_by_their_own_size() -> None:
    """A slice of a big tensor is measured as the slice."""
    assert measure(nn.Sigmoid(), torch.zeros(10 * MIB)[: MIB // 4], runs=1).peak_bytes == 2 * MIB


def test_the_process_peak_follows_big_values() -> None:
    found = measure(nn.Sequential(nn.Sigmoid(), nn.Tanh()), torch.zeros(16 * MIB), runs=1)
    if found.process_bytes is None:
        assert found.process_why
        return
    assert found.process_bytes == pytest.approx(2 * 64 * MIB, rel=0.1)  # what the call adds to its input


def test_without_proc_the_process_peak_is_none_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_module, "_CLEAR", Path("/nowhere/clear_refs"))
    found = measure(nn.Sigmoid(), IMAGE, runs=1)
    assert found.process_bytes is None
    assert "Linux" in found.process_why
    assert found.process_why in str(found)


def test_the_model_keeps_its_mode_and_weights() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout())
    model[1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    measure(model, torch.randn(2, 3, 8, 8), runs=1)
    assert [m.training for m in model] == [True, False, True]
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_keyword_inputs() -> None:
    class Named(nn.Module):
        def forward(self, *, image: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"out": image + 1}

    assert measure(Named(), {"image": IMAGE}, runs=1).peak_bytes == 2 * MIB


@pytest.mark.parametrize(("device", "message"), [("mps", "not supported"), ("gpu0", "no device 'gpu0'")])
def test_a_device_that_cannot_be_measured(device: str, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        measure(nn.Sigmoid(), IMAGE, device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_cuda_asked_for_and_not_there() -> None:
    with pytest.raises(UnsupportedError, match="no CUDA device here"):
        measure(nn.Sigmoid(), IMAGE, device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_bytes_by_hand_on_a_gpu() -> None:
    model = nn.Sequential(nn.Sigmoid(), nn.Tanh(), nn.ReLU(inplace=True))
    assert measure(model, IMAGE, device="cuda", runs=3).peak_bytes == 3 * MIB


def test_inputs_that_do_not_fit_are_one_line() -> None:
    with pytest.raises(UnsupportedError, match="Linear does not run on these inputs") as found:
        measure(nn.Linear(3, 4), torch.zeros(2, 5))
    assert "\n" not in str(found.value)


def test_runs_below_one() -> None:
    with pytest.raises(UnsupportedError, match="at least 1"):
        measure(nn.Sigmoid(), IMAGE, runs=0)


def test_alternating_calls_every_function_equally_often() -> None:
    calls: list[str] = []
    found = alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, runs=4)
    assert calls.count("a") == calls.count("b") == 4 + WARM_UP
    assert set(found) == {"a", "b"}


def test_it_prints_within_the_width() -> None:
    line = str(measure(nn.Sigmoid(), IMAGE, runs=1))
    assert len(line) <= WIDTH + 40  # one sentence, not a table
    assert "2.00 MiB" in line
