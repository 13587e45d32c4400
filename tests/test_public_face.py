"""The names of `splitfx` are what design says they are, also after everything has been imported."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

import splitfx
from splitfx.passes import Group

FACE = """
plan Plans Choice diff Difference
trace transform explain compare profile measure save load export_onnx export_executorch check_onnx
inspect_html diagnose draw_inputs
Plan Pass Promise Outcome Note Facts register_op Window
stream pareto compare_halo session_options RowSource Curve HaloComparison
export_bundle Bundle export_branches Branches
finetune evaluate load_data Data History Score MultiModelLoss Recipe
search_factors search_front preview_search SearchSpace SearchStudy SearchResult SearchFront SearchPreview
Tuner FunctionTuner RecipeTuner
Comparison ExecutorchFile Explanation Measurement Profile RuntimeReport
SplitfxError TraceError PlanError UnsupportedError PassError VerificationError ExportError MissingExtraError
TrainingError
"""


def test_the_face_is_as_written_down() -> None:
    assert sorted(splitfx.__all__) == sorted(FACE.split())
    assert sorted(dir(splitfx)) == sorted([*FACE.split(), "__version__"])


def test_every_public_name_resolves_and_is_no_module() -> None:
    for name in splitfx.__all__:
        assert not inspect.ismodule(getattr(splitfx, name)), name


def test_functions_are_not_shadowed_by_the_modules_that_hold_them() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.MaxPool2d(2)).eval()
    x = torch.randn(1, 3, 12, 12)
    split = splitfx.transform(model, Group(factors=(2,), fusion="keep"), x)
    assert splitfx.trace(model, x)(x).shape == split(x).shape
    assert splitfx.profile(split, x).macs > 0
    assert splitfx.measure(split, x, runs=1).peak_bytes > 0
    assert "group" in str(splitfx.explain(split))


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'transfrom'"):
        splitfx.transfrom  # noqa: B018
