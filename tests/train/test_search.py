"""`search_factors`: the paper's own table replayed, resumed, shared by workers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

import splitfx
from splitfx.errors import PlanError, TrainingError
from splitfx.ir.graph import info
from splitfx.passes import Group
from splitfx.train.recipe import Recipe
from splitfx.train.search.front import search_front
from splitfx.train.search.greedy import search_factors
from splitfx.train.search.inherit import extended, fusions, kept_weight
from splitfx.train.search.preview import preview_search
from splitfx.train.search.space import SearchSpace
from splitfx.train.search.study import SearchStudy
from splitfx.train.search.tuner import FunctionTuner, RecipeTuner
from tests.train.networks import planted

X = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
# Table 1 of paper A: rows are blocks 1-5, columns factors 1, 2, 4, 6, 8.
PAPER = (
    (93.57, 93.64, 93.55, 93.41, 93.46),
    (93.46, 93.36, 93.38, 93.03, 93.03),
    (93.38, 93.06, 92.78, 92.95, 92.75),
    (93.06, 93.21, 92.89, 92.71, 92.34),
    (93.21, 93.16, 93.20, 93.45, 93.14),
)
COLUMNS = (1, 2, 4, 6, 8)


def five_blocks(width: int = 8) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    channels = 1
    for _ in range(5):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width, 6)).eval()


def factors_of(split: fx.GraphModule) -> tuple[int, ...]:
    steps = info(split).steps
    return tuple(steps[-1].options["factors"]) if steps else (1,) * 5


class Paper:
    """Gives the accuracies of the paper: a trial differs from what was accepted in its last factor above 1."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, ...]] = []

    def __call__(self, split: fx.GraphModule) -> float:
        factors = factors_of(split)
        self.calls.append(factors)
        last = max((i for i, f in enumerate(factors) if f > 1), default=0)
        return PAPER[last][COLUMNS.index(factors[last])]


def test_replay_of_the_paper() -> None:
    paper = Paper()
    found = search_factors(SearchSpace(five_blocks(), X), FunctionTuner(paper), tolerance=0.51, verify=False)
    assert found.selected[:4] == (8, 4, 2, 2)
    assert found.finished
    lines = [line.accuracy for line in found.lines]
    assert lines[0] == dict(zip(COLUMNS, PAPER[0], strict=True))
    assert lines[1] == dict(zip(COLUMNS[:4], PAPER[1], strict=False))  # 6 fails, 8 is not tried
    assert lines[2] == {1: 93.38, 2: 93.06, 4: 92.78}
    assert [line[1] for line in lines] == [row[0] for row in PAPER]
    assert found.plan.passes[0].factors == found.selected  # type: ignore[attr-defined]
    text = found.trend()
    assert "block 1" in text
    assert "93.46*" in text
    assert len(paper.calls) == 1 + 4 + 3 + 2 + 2 + 4


def test_replay_against_each_block_gives_8_for_block_2() -> None:
    found = search_factors(
        SearchSpace(five_blocks(), X), FunctionTuner(Paper()), tolerance=0.5, reference="block", verify=False
    )
    assert found.selected[:2] == (8, 8)


def test_a_block_that_cannot_be_divided_is_not_tried() -> None:
    """The first conv reads the image: with no other beside it, its block stays as it is."""
    torch.manual_seed(0)
    one = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    rest = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.MaxPool2d(2))
    model = nn.Sequential(*one, *rest, nn.Flatten(), nn.Linear(8 * 64, 6)).eval()
    tried = []

    def accuracy(split: fx.GraphModule) -> float:
        tried.append(factors_of(split))
        return 90.0

    found = search_factors(SearchSpace(model, X, factors=(2, 4)), FunctionTuner(accuracy), verify=False)
    assert found.selected == (1, 4)
    assert tried[1:] == [(1, 2), (1, 4)]


def test_factors_above_the_channels_are_not_tried() -> None:
    """They would leave a block whole, with the accuracy of the unsplit model: the largest factor of all."""
    tried = []

    def accuracy(split: fx.GraphModule) -> float:
        tried.append(factors_of(split))
        return 90.0

    found = search_factors(SearchSpace(five_blocks(4), X), FunctionTuner(accuracy), verify=False)
    assert found.selected == (4,) * 5
    assert len(tried) == 1 + 2 * 5
    assert found.after.macs < found.before.macs
    shown = preview_search(SearchSpace(five_blocks(4), X))
    assert {factor for _, _, factor, _, _ in shown.rows} == {2, 4}
    assert shown.most == 10
    assert all(one.macs < shown.before.macs for _, _, _, one, _ in shown.rows)


def test_a_limit_ends_a_search_that_goes_on_later(tmp_path: Path) -> None:
    run = lambda paper, resume=False, **more: search_factors(  # noqa: E731
        SearchSpace(five_blocks(), X), FunctionTuner(paper), tolerance=0.51, verify=False,
        study=SearchStudy(tmp_path / "s", resume), **more,
    )  # fmt: skip
    first, rest = Paper(), Paper()
    part = run(first, max_trials=6)
    assert not part.finished
    assert part.selected == (8, 1)
    assert "stopped at a limit" in str(part)
    with pytest.raises(TrainingError, match="is not empty; go on with the search in it"):
        run(rest)
    done = run(rest, resume=True)
    assert done.selected[:4] == (8, 4, 2, 2)
    assert len(first.calls) == 1 + 6
    assert len(rest.calls) == 16 - 7
    again = Paper()
    assert run(again, resume=True).lines == done.lines
    assert not again.calls
    timed = search_factors(SearchSpace(five_blocks(), X), FunctionTuner(Paper()), max_seconds=0.0)
    assert not timed.finished
    assert timed.split(X).shape == (2, 6)


def test_a_study_of_another_search_is_refused(tmp_path: Path) -> None:
    run = lambda model, **options: search_factors(  # noqa: E731
        SearchSpace(model, X, options=options), FunctionTuner(Paper()), study=SearchStudy(tmp_path, resume=True),
        max_trials=0, verify=False,
    )  # fmt: skip
    run(five_blocks())
    other = five_blocks()
    nn.init.zeros_(other[0].bias)  # type: ignore[index, arg-type]
    with pytest.raises(TrainingError, match="made for something else: weights is"):
        run(other)
    with pytest.raises(TrainingError, match=r"made for something else: model: 0.bias is .8. there, .12. here"):
        run(five_blocks(12))
    with pytest.raises(TrainingError, match="made for something else: options: fusion is None there, keep here"):
        run(five_blocks(), fusion="keep")


def test_workers_that_share_a_folder_find_the_same(tmp_path: Path) -> None:
    """While one worker is at a trial, another comes, takes one that is free, and leaves."""
    other = Paper()

    def run(evaluate: Any, **more: Any) -> Any:
        return search_factors(
            SearchSpace(five_blocks(), X),
            FunctionTuner(evaluate),
            tolerance=0.51,
            study=SearchStudy(tmp_path, resume=True),
            verify=False,
            **more,
        )

    class Visited(Paper):
        def __call__(self, split: fx.GraphModule) -> float:
            if max(factors_of(split)) > 1 and len(self.calls) % 3 == 1:
                run(other, max_trials=1)
            return super().__call__(split)

    mine = Visited()
    found = run(mine)
    assert found.selected[:4] == (8, 4, 2, 2)
    calls = [*mine.calls, *other.calls]
    assert len(other.calls) >= 3
    assert len(calls) == len(set(calls))  # nothing twice
    assert {line.block: line.accuracy for line in found.lines}[3] == {1: 93.38, 2: 93.06, 4: 92.78}


SEEN = torch.randn(8, 1, 32, 32, generator=torch.Generator().manual_seed(1))


class Solved:
    """A tuner's functions: what a solved split scores, and what it scores once it is trained."""

    def __init__(self, solved: dict[tuple[int, ...], float], trained: dict[tuple[int, ...], float]) -> None:
        self.solved, self.trained, self.tuned = solved, trained, dict[tuple[int, ...], float]()

    def tune(self, split: fx.GraphModule) -> None:
        self.tuned[factors_of(split)] = split(SEEN).sum().item()

    def evaluate(self, split: fx.GraphModule) -> float:
        factors = factors_of(split)[:2]  # of five that the unsplit model is said to have
        return self.trained[factors] if factors in self.tuned else self.solved[factors]

    def search(self, folder: Path, **options: Any) -> Any:
        return search_factors(
            SearchSpace(two_blocks(), X, factors=(2, 4)), FunctionTuner(self.evaluate, self.tune), verify=False,
            **{"calibration": SEEN, "near": 2.0, "study": SearchStudy(folder, resume=True), **options},
        )  # fmt: skip


def two_blocks() -> nn.Module:
    torch.manual_seed(0)
    first = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    second = [nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(8 * 64, 6)).eval()


def test_a_split_is_solved_first_and_trained_only_near_the_tolerance(tmp_path: Path) -> None:
    scores = Solved(
        {(1, 1): 90.0, (2, 1): 89.6, (4, 1): 80.0, (1, 2): 0.0, (2, 2): 88.5, (2, 4): 88.0},
        {(2, 1): 90.5, (2, 2): 89.7, (2, 4): 89.0},
    )
    found = scores.search(tmp_path / "s")
    assert [line.accuracy for line in found.lines] == [{1: 90.0, 2: 89.6, 4: 80.0}, {1: 89.6, 2: 89.7, 4: 89.0}]
    assert [line.untrained for line in found.lines] == [(2, 4), ()]
    assert found.selected == (2, 2)
    assert set(scores.tuned) == {(2, 2), (2, 4)}  # 89.6 is enough, 80.0 is hopeless
    assert "~89.60*" in found.trend()
    assert "~ solved on the calibration, not trained" in str(found)
    # What was trained is the split that was solved on the calibration, of the original model.
    plain, solved = (
        splitfx.transform(two_blocks(), Group(factors=(2, 2), lowering="branches", calibration=one), X)
        for one in (None, SEEN)
    )
    assert scores.tuned[2, 2] == pytest.approx(float(solved(SEEN).sum()), rel=1e-4)
    assert scores.tuned[2, 2] != pytest.approx(float(plain(SEEN).sum()), rel=1e-2)
    again = Solved(scores.solved, {})
    assert again.search(tmp_path / "s").lines == found.lines
    assert not again.tuned


def test_another_tolerance_is_answered_from_the_same_trials(tmp_path: Path) -> None:
    """A solved trial decides nothing for good: what is selected follows from the scores and the tolerance."""
    solved = {(1, 1): 90.0, (2, 1): 89.6, (4, 1): 80.0, (2, 2): 70.0, (1, 2): 70.0}
    Solved(solved, {}).search(tmp_path / "s")
    strict = Solved(solved, {(2, 1): 89.8})
    found = strict.search(tmp_path / "s", tolerance=0.3)
    assert set(strict.tuned) == {(2, 1)}
    assert found.selected == (2, 1)
    assert found.accuracy == 89.8
    assert [line.untrained for line in found.lines] == [(4,), (2,)]


def test_what_a_search_with_calibration_refuses(tmp_path: Path) -> None:
    scores = Solved({(1, 1): 90.0, (2, 1): 0.0, (1, 2): 0.0}, {})
    scores.search(tmp_path / "s")
    with pytest.raises(TrainingError, match="made for something else: calibration is"):
        scores.search(tmp_path / "s", calibration=SEEN + 1)
    with pytest.raises(TrainingError, match="made for something else: calibration is"):
        scores.search(tmp_path / "s", calibration=None)
    with pytest.raises(PlanError, match="near is in points of accuracy, 0 or more; got -1"):
        scores.search(tmp_path / "t", near=-1.0)
    with pytest.raises(PlanError, match="calibration"):
        scores.search(tmp_path / "u", calibration=torch.randn(8, 3, 32, 32))


def test_search_with_training(tmp_path: Path) -> None:
    """On generated data: what is selected keeps the tolerance, and the split that is given has that accuracy."""
    made = planted((1, 32, 32), samples=360)
    model = five_blocks()
    splitfx.finetune(model, made.train, made.val, Recipe(epochs=3, lr=0.05, batch_size=32), progress=False)
    found = search_factors(
        SearchSpace(model, X, factors=(2, 4)),
        RecipeTuner(made.train, made.val, Recipe(epochs=1, batch_size=32)),
        tolerance=10.0,
        study=SearchStudy(tmp_path),
        verify=False,
    )
    from splitfx.train.finetune import evaluate

    assert evaluate(found.split, made.val).accuracy == found.accuracy
    assert found.accuracy >= found.original - 10
    assert found.after.macs < found.before.macs
    assert not list(tmp_path.glob("trials/*/run"))
    told = json.loads(found.to_json())
    assert tuple(told["selected"]) == found.selected
    assert splitfx.Plan.from_toml(told["plan"]) == found.plan
    found.plot(tmp_path / "trend.png")
    dataclasses.replace(found, reference="block").plot(tmp_path / "block.svg")  # whose bound moves: no line
    found.plot(tmp_path / "original.svg")
    assert "tolerance" in (tmp_path / "original.svg").read_text()
    assert "tolerance" not in (tmp_path / "block.svg").read_text()
    assert (tmp_path / "trend.png").stat().st_size > 5000
    assert max(map(len, str(found).splitlines())) <= 100


def test_preview_lists_every_trial() -> None:
    found = preview_search(SearchSpace(five_blocks(), X, factors=(2, 4)))
    assert [(b, f) for b, _, f, _, _ in found.rows] == [(b, f) for b in range(1, 6) for f in (2, 4)]
    kept = {(b, f): share for b, _, f, _, share in found.rows}
    assert kept[2, 4] < kept[2, 2] < 1
    assert found.most == 10
    assert max(map(len, str(found).splitlines())) <= 100
    assert json.loads(found.to_json())["before"]["macs"] == found.before.macs


def test_a_front_of_accuracy_work_and_peak(tmp_path: Path) -> None:
    """Of what was tried, exactly the plans that no other beats; the first ones follow the kept weight."""

    def accuracy(split: fx.GraphModule) -> float:
        return 90.0 - 0.5 * sum(f > 1 for f in factors_of(split)) - 0.1 * sum(factors_of(split))

    run = lambda count: search_front(  # noqa: E731
        SearchSpace(five_blocks(), X, factors=(2, 4)), FunctionTuner(accuracy), max_trials=count, verify=False,
        study=SearchStudy(tmp_path / "front", resume=True),
    )  # fmt: skip
    first = run(4)
    assert len(first.tried) == 4
    assert (1,) * 5 in {one.factors for one in first.tried}
    found = run(10)
    assert len(found.tried) == 14
    assert {one.factors for one in first.tried} <= {one.factors for one in found.tried}
    for one in found.tried:
        better = [
            other
            for other in found.tried
            if other.accuracy >= one.accuracy
            and other.figures.macs <= one.figures.macs
            and other.figures.peak_bytes <= one.figures.peak_bytes
            and (other.accuracy, other.figures) != (one.accuracy, one.figures)
        ]
        assert (one in found.best) == (not better)
    split = found.split(found.best[0].factors)
    assert factors_of(split) == found.best[0].factors
    with pytest.raises(PlanError, match="were not tried"):
        found.split((3, 3, 3, 3, 3))
    assert max(map(len, str(found).splitlines())) <= 100
    assert len(json.loads(found.to_json())["tried"]) == 14
    found.plot(tmp_path / "front.png")
    assert (tmp_path / "front.png").stat().st_size > 5000


def test_a_front_ends_when_all_plans_are_known() -> None:
    small = nn.Sequential(*list(five_blocks().children())[:6], nn.Flatten(), nn.Linear(8 * 256, 3)).eval()
    space = SearchSpace(small, X, factors=(2,))
    found = search_front(space, FunctionTuner(lambda split: 50.0), max_trials=99, verify=False)
    assert {one.factors for one in found.tried} == {(1,), (2,)}
    assert factors_of(found.split((2,))) == (2,)  # without a folder too


def test_a_front_names_blocks_that_are_left_whole_by_1() -> None:
    """The second block is one conv, which nothing can divide as long as the first is whole."""
    from tests.train.networks import network

    space = SearchSpace(network(), torch.zeros(1, 1, 12, 12), factors=(2,))
    found = search_front(space, FunctionTuner(lambda split: 50.0), max_trials=99, verify=False)
    assert {one.factors for one in found.tried} == {(1, 1), (2, 1), (2, 2)}
    assert len({one.figures for one in found.tried}) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"factors": (1, 2)}, "from 2 on in rising order"),
        ({"factors": (4, 2)}, "from 2 on in rising order"),
        ({"options": {"fusion": "none"}}, "needs a fusion"),
        ({"options": {"lowering": "auto"}}, "does not depend on timing"),
        ({"options": {"factors": (2,)}}, "without factors"),
        ({"options": {"fusoin": "keep"}}, "fusoin"),
        ({"example_inputs": None}, "no input sizes"),
        ({"model": nn.Sequential(nn.Linear(4, 4)), "example_inputs": torch.zeros(1, 4)}, "no convolution"),
    ],
)
def test_spaces_that_are_refused(settings: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"model": five_blocks(), "example_inputs": X, **settings}
    with pytest.raises(PlanError, match=message):
        SearchSpace(**given)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reference": "first"}, "'original' or 'block'"),
        ({"tolerance": -1.0}, "0 or more"),
        ({"tuner": Paper()}, "give RecipeTuner.train, val. or FunctionTuner.evaluate."),
        ({"space": five_blocks()}, "give SearchSpace.model, example_inputs."),
    ],
)
def test_searches_that_are_refused(settings: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"space": SearchSpace(five_blocks(), X), "tuner": FunctionTuner(Paper()), **settings}
    with pytest.raises(PlanError, match=message):
        search_factors(**given)


def test_what_a_tuner_and_a_front_refuse() -> None:
    space = SearchSpace(five_blocks(), X)
    with pytest.raises(PlanError, match="give max_trials or max_seconds"):
        search_front(space, FunctionTuner(Paper()))
    with pytest.raises(PlanError, match="give evaluate"):
        FunctionTuner(None)  # type: ignore[arg-type]
    with pytest.raises(TrainingError, match="from 0 to 100"):
        search_factors(space, FunctionTuner(lambda split: 101.0))
    with pytest.raises(PlanError, match="no recipe 'fintune'.*Did you mean 'finetune'"):
        RecipeTuner(planted().train, planted().val, "fintune")


# ---------------------------------------------------------------- weights that are handed on


@pytest.mark.parametrize("order", ["given", "energy"])
@pytest.mark.parametrize("lowering", ["branches", "grouped"])
def test_trained_weights_are_handed_on(lowering: str, order: str) -> None:
    """The same factors give the same function; one block more leaves what lies in front of it as it was."""
    widths = (8, 16, 24)
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    channels = 1
    for width in widths:
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
        channels = width
    dense = splitfx.trace(nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * 16, 5)).eval(), X)
    step = lambda *factors: Group(factors=factors, lowering=lowering, order=order)  # noqa: E731  # type: ignore[arg-type]
    trained = extended(dense, None, step(4, 1, 1))
    with torch.no_grad():
        for tensor in trained.state_dict().values():
            if tensor.dtype.is_floating_point:
                tensor += 0.1 * torch.rand_like(tensor)
    same = extended(dense, trained, step(4, 1, 1))
    assert torch.equal(same(X), trained(X))
    further = extended(dense, trained, step(4, 2, 1))
    assert fusions(further) == ["fusion1", "fusion2"]
    held = {}
    for name, graph in (("before", trained), ("after", further)):
        graph.get_submodule("fusion1").register_forward_hook(lambda m, i, o, n=name: held.__setitem__(n, o))
        graph(X)
    assert held["before"].shape[1] == 8
    assert held["after"].shape[1] == 16
    far = torch.cdist(held["after"].transpose(0, 1).flatten(1), held["before"].transpose(0, 1).flatten(1))
    assert float(far.min(1).values.max()) < 1e-4  # every channel is one of the trained ones
    head = f"{len(layers) + 1}.weight"
    assert torch.equal(further.state_dict()[head], trained.state_dict()[head])
    kept = [kept_weight(dense, splitfx.transform(dense, step(f, 1, 1))) for f in (2, 4)]
    assert 0 < kept[1] < kept[0] < 1


def test_weights_of_another_plan_are_refused() -> None:
    dense = splitfx.trace(five_blocks(), X)
    trained = extended(dense, None, Group(factors=(4, 2, 1, 1, 1), lowering="branches"))
    with pytest.raises(TrainingError, match="the trained split is of another plan"):
        extended(dense, trained, Group(factors=(2, 2, 2, 1, 1), lowering="branches"))
