"""Group on whole models, end to end: the pipeline's oracle, ONNX under onnxruntime, state_dict, backward.

Slow: `make slow` runs it with the other sweeps.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import splitfx
from splitfx.analysis import facts
from splitfx.analysis.blocks import blocks
from splitfx.passes import Group

MODELS: dict[str, dict[str, Any]] = {
    "vgg16": {"factors": (8, 2, 2, 4, 4)},
    "vgg16 by 6": {"factors": (6, 6, 6, 6, 6)},
    "resnet18": {"factors": (8, 4, 2, 2, 2)},
    "resnet50": {},
    "densenet121": {},
    "mobilenet_v2": {},
    "shufflenet_v2_x1_0": {},
    "googlenet": {},
    "efficientnet_b0": {},
    "efficientnet_b0 relaxed": {"gating": "relaxed"},
    "regnet_y_400mf": {},
    "regnet_y_400mf grouped": {"lowering": "grouped"},
}


def model_of(name: str) -> nn.Module:
    import torchvision

    options = {"init_weights": False} if name == "googlenet" else {}
    torch.manual_seed(0)
    return torchvision.models.get_model(name, weights=None, **options).eval()


@pytest.mark.slow
@pytest.mark.parametrize("case", sorted(MODELS))
def test_whole_models(case: str, tmp_path: Path) -> None:
    model = model_of(case.split()[0])
    x = torch.randn(2, 3, 64, 64)
    graph = splitfx.trace(model, x)
    count = len(blocks(facts(graph)))
    split = splitfx.transform(graph, Group(**{"factors": (2,) * count, **MODELS[case]}))
    step = splitfx.explain(split).steps[0]
    assert step.changed
    assert step.difference is not None
    assert step.difference < 1e-12
    assert step.after.macs < step.before.macs

    path = splitfx.export_onnx(split, tmp_path / "split.onnx")
    report = splitfx.check_onnx(split, path, providers=("cpu",), runs=1)
    assert report.ok, str(report)

    again = copy.deepcopy(split)
    for parameter in again.parameters():
        nn.init.zeros_(parameter)
    again.load_state_dict(split.state_dict())
    assert torch.equal(again(x), split(x))

    split.train()
    split(x).square().mean().backward()
    gradients = [p.grad for p in split.parameters()]
    assert all(g is not None and g.isfinite().all() for g in gradients)
