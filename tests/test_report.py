"""Texts for people: width, units, folding."""

import pytest
import torch
from torch import nn

import splitfx
from splitfx.compiler.pipeline import Figures, Step
from splitfx.compiler.protocol import Note
from splitfx.passes import Group
from splitfx.report.explain import Explanation
from splitfx.report.explanation import explanation_text, folded, ratio
from tests.traced import made_once


def network(width: int = 8) -> nn.Module:
    block = [nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        *block,
        nn.MaxPool2d(2),
        nn.Conv2d(width, width, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 4),
    )


@made_once
def split(lowering: str = "branches"):
    plan = splitfx.Plan([Group(factors=(2, 2, 2), lowering=lowering)], input_shape=(1, 3, 16, 16))  # type: ignore[arg-type]
    return splitfx.transform(network(), plan)


def step(notes: tuple[Note, ...], changed: bool = True, difference: float | None = 1e-15) -> Step:
    return Step(
        "group",
        {"factors": [2] * 40},
        "retrain",
        changed,
        notes,
        1.5,
        difference,
        Figures(10**6, 10**9, 2**20, "a" * 70),
        Figures(5 * 10**5, 10**8, 2**21, "b" * 70),
    )


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (10, 10, "same"),
        (15.47, 7.16, "÷2.16"),
        (1, 1.3, "×1.30"),
        (100, 1, "÷100"),
        (0, 5, "-"),
        (1000, 1001, "+0.1 %"),
    ],
)
def test_ratio(before: float, after: float, words: str) -> None:
    assert ratio(before, after) == words


def test_equal_notes_are_one_line() -> None:
    notes = [Note(f"layer{i}", "left undivided: why") for i in range(12)] + [Note("x", "else")]
    assert folded(notes) == [
        ("12 layers: layer0, layer1, layer2 and 9 more", "left undivided: why"),
        ("x", "else"),
    ]


def test_notes_that_differ_in_names_of_layers_are_one_line() -> None:
    notes = [Note(f"layer1.{i}.bn1", f"folded into layer1.{i}.conv1") for i in range(5)]
    assert folded(notes) == [
        (
            "5 layers: layer1.0.bn1, layer1.1.bn1, layer1.2.bn1 and 2 more",
            "folded into layer1.0.conv1, layer1.1.conv1, layer1.2.conv1 and 2 more",
        )
    ]
    figures = [Note(f"conv{i}", f"loses {i} of 9 kernels") for i in range(5)]
    assert len(folded(figures)) == 5  # what differs in more than names stays apart


def test_explanation_fits_100_columns() -> None:
    notes = tuple(
        Note("features.denseblock1." * n + "conv", "why " * 60, k)
        for n in range(1, 6)
        for k in ("did", "declined", "info")
    )  # type: ignore[arg-type]
    text = explanation_text(Explanation("Net", "torch.export", notes, (step(notes), step(notes, False, None))))
    assert max(map(len, text.splitlines())) <= 100
    assert "all 2 passes together" in text


def test_explanation_tells_promise_oracle_and_units() -> None:
    text = str(splitfx.explain(split()))
    for part in ("promise retrain", "Verified in float64", "÷", "KiB", "fusion2", "2 branches", "declined"):
        assert part in text


def test_unverified_and_untouched_are_said() -> None:
    assert "Not verified" in explanation_text(Explanation("N", "f", (), (step((), True, None),)))
    assert "changed nothing" in explanation_text(Explanation("N", "f", (), (step((), False, None),)))
    assert "no pass has run" in explanation_text(Explanation("N", "f", (), ()))


def test_comparison_text() -> None:
    model = network().eval()
    text = str(splitfx.compare(model, split(), torch.zeros(1, 3, 16, 16)))
    assert "peak memory" in text
    assert "largest value" in text
    assert max(map(len, text.splitlines())) <= 100


def test_texts_are_as_wide_as_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    notes = (Note("conv", "why " * 60),)
    explanation = Explanation("Net", "torch.export", notes, ())
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    for columns, widest in ((72, 72), (140, 140), (400, 160), (20, 60)):
        monkeypatch.setenv("COLUMNS", str(columns))
        lines = explanation_text(explanation).splitlines()
        assert widest - 8 < max(map(len, lines)) <= widest
