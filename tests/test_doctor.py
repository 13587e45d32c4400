"""`splitfx doctor`: what it says about installations that are broken in the known ways."""

from __future__ import annotations

import json

import pytest

from splitfx.cli import doctor
from splitfx.cli.doctor import Provider, diagnose

ALL = dict.fromkeys(doctor.PACKAGES, "1.0") | {"onnxruntime": None}
CPU, CUDA, NO_CUDA = (
    Provider("cpu", True),
    Provider("cuda", True),
    Provider("cuda", False, "the library x.so is missing"),
)


def problems(packages, providers, gpu):
    return [one for one in doctor._problems({**ALL, **packages}, providers, gpu) if one.serious]


def test_this_installation() -> None:
    found = diagnose()
    assert found.packages["torch"]
    assert any(one.name == "cpu" and one.starts for one in found.providers)
    assert json.loads(found.to_json())["ok"] is found.ok
    assert "provider cpu" in str(found)
    assert "torch" in str(found)


def test_a_good_installation_has_no_problem() -> None:
    assert problems({}, (CPU, CUDA), "GPU") == []
    assert problems({}, (CPU, NO_CUDA), None) == []


@pytest.mark.parametrize(
    ("packages", "providers", "gpu", "says", "do"),
    [
        (
            {"onnxruntime": "1.0"},
            (CPU, CUDA),
            "GPU",
            "overwrite each other",
            "uninstall -y onnxruntime onnxruntime-gpu",
        ),
        ({}, (), None, "cannot be used", "--force-reinstall"),
        ({"onnxruntime-gpu": None}, (), None, "not installed", "onnxruntime-gpu"),
        ({}, (CPU, NO_CUDA), "GPU", "x.so is missing", "cuda,cudnn"),
        (
            {"onnxruntime-gpu": None, "onnxruntime": "1.0"},
            (CPU, NO_CUDA),
            "GPU",
            "CPU only",
            "uninstall -y onnxruntime &&",
        ),
        ({"onnxscript": None}, (CPU, CUDA), "GPU", "onnxscript is not installed", "pip install onnxscript"),
    ],
)
def test_each_problem_says_what_to_do(packages, providers, gpu, says: str, do: str) -> None:
    found = problems(packages, providers, gpu)
    assert len(found) == 1
    assert says in found[0].what
    assert do in found[0].do
