"""`finetune`: what it minimises, what it refuses, what it leaves behind."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import splitfx
from splitfx.errors import TrainingError
from splitfx.passes import Group
from splitfx.train import checkpoint
from splitfx.train.data import Images
from splitfx.train.finetune import evaluate, finetune
from splitfx.train.multi_model import MultiModelLoss
from splitfx.train.objective import Objective
from splitfx.train.recipe import Recipe
from tests.train.networks import data, network, planted, split_network

QUICK = Recipe(epochs=2, batch_size=32, lr=0.05)


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_split_learns() -> None:
    made = planted(samples=900)
    split = split_network()
    history = finetune(split, made.train, made.val, Recipe(epochs=6, lr=0.1), progress=False)
    assert history.accuracy > history.before.accuracy + 30
    found, best = evaluate(split, made.val), history.score(history.best)
    assert (found.accuracy, found.samples) == (best.accuracy, best.samples)
    assert found.loss == pytest.approx(best.loss)
    assert [one.samples for one in history.epochs] == [len(made.train)] * 6  # type: ignore[arg-type]
    assert "teacher" in history.notes[0]


def test_history_as_table_and_csv() -> None:
    made = data()
    history = finetune(split_network(), made.train, made.val, QUICK, teacher=network(), progress=False)
    text = str(history)
    assert max(map(len, text.splitlines())) <= 100
    assert "distillation" in text
    rows = list(csv.DictReader(io.StringIO(history.to_csv())))
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    assert float(rows[2]["val_accuracy"]) == history.epochs[1].val.accuracy
    assert not history.notes


def test_the_same_seed_gives_the_same_weights_and_another_one_others() -> None:
    made = data()
    found = []
    for seed in (0, 0, 1):
        torch.rand(3)  # what was drawn before does not matter
        split = split_network()
        finetune(split, made.train, made.val, Recipe(epochs=1, seed=seed, keep="last"), progress=False)
        found.append(weights(split))
    assert same(found[0], found[1])
    assert not same(found[0], found[2])


def test_generators_modes_and_teacher_are_left_alone() -> None:
    made, teacher, split = data(), network().train(), split_network()
    split.train()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    before = weights(teacher)
    finetune(split, made.train, made.val, QUICK, teacher=teacher, progress=False)
    assert torch.equal(torch.rand(3), expected)
    assert split.training
    assert teacher.training
    assert same(weights(teacher), before)
    assert all(p.requires_grad for p in teacher.parameters())


def test_loss_is_the_mean_over_each_batch() -> None:
    """One epoch of plain SGD by hand gives the same weights."""
    made = data(100)
    model = nn.Sequential(nn.Flatten(), nn.Linear(144, 6))
    by_hand = nn.Sequential(nn.Flatten(), nn.Linear(144, 6))
    by_hand.load_state_dict(model.state_dict())
    recipe = Recipe(epochs=1, batch_size=len(made.train), momentum=0.0, weight_decay=0.0, schedule="constant", lr=0.5)  # type: ignore[arg-type]
    finetune(model, made.train, made.val, Recipe(**{**vars(recipe), "keep": "last"}), progress=False)
    images, targets = made.train.images, made.train.targets  # type: ignore[attr-defined]
    nn.functional.cross_entropy(by_hand(images), targets).backward()
    with torch.no_grad():
        for p in by_hand.parameters():
            p -= 0.5 * p.grad  # type: ignore[operator]
    for a, b in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_distillation_is_zero_on_the_teacher_itself() -> None:
    model = network()
    x, y = torch.randn(4, 1, 12, 12), torch.arange(4)
    total, parts = Objective(model, Recipe(distillation=0.25), model)(x, y)
    torch.testing.assert_close(parts["distillation"], torch.zeros(()), atol=1e-6, rtol=0)
    torch.testing.assert_close(total, 0.75 * nn.functional.cross_entropy(model(x), y))
    other = network(width=8)
    nn.init.normal_(other[-1].weight)  # type: ignore[index, arg-type]
    assert float(Objective(model, Recipe(distillation=0.25), other)(x, y)[1]["distillation"]) > 0.001


class Pull(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(3))

    def forward(self) -> dict[str, torch.Tensor]:
        return {"pull": (self.alpha - 2).square().sum()}


def test_hooks_of_a_loss_and_a_regulariser() -> None:
    """Several losses by name; a regulariser's own parameters are trained along, without decay."""

    pull, made = Pull(), data()

    def loss(split: nn.Module, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        entropy = nn.functional.cross_entropy(split(x), y)
        return {"first": 0.5 * entropy, "second": 0.5 * entropy}

    recipe = Recipe(epochs=2, weight_decay=10.0, lr=0.02, keep="last")
    history = finetune(
        network(), made.train, made.val, recipe, loss=loss, regulariser=pull, progress=False
    )  # fmt: skip
    assert set(history.epochs[0].losses) == {"first", "second", "pull"}
    assert float((pull.alpha - 2).abs().max()) < 0.9  # decay of 10 would pull it below 1


def test_a_regulariser_comes_back_with_the_weights_that_it_belongs_to() -> None:
    """The network is spoilt after its first epoch, so that the second is not the best."""
    made, pull, split = data(), Pull(), network()
    seen = [(weights(split), weights(pull))]

    def spoil(epoch: Any) -> None:
        seen.append((weights(split), weights(pull)))
        with torch.no_grad():
            split[-1].weight.mul_(-1000)  # type: ignore[index, union-attr]

    history = finetune(
        split, made.train, made.val, Recipe(epochs=2, lr=0.05), regulariser=pull, progress=False, on_epoch=spoil
    )  # fmt: skip
    assert history.best < 2
    assert not same(seen[history.best][1], seen[2][1])
    assert same(weights(split), seen[history.best][0])
    assert same(weights(pull), seen[history.best][1])


def test_sum_over_several_models() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.sub = network(), network(width=4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x)

        def forward_all(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [self.base(x), self.sub(x)]

    two, made = Two(), data()
    x, y = torch.randn(4, 1, 12, 12), torch.arange(4)
    parts = MultiModelLoss((1.0, 0.5))(two, x, y)
    torch.testing.assert_close(parts["sub0"], 0.5 * nn.functional.cross_entropy(two.sub(x), y))
    history = finetune(two, made.train, made.val, QUICK, loss=MultiModelLoss(), progress=False)
    assert set(history.epochs[0].losses) == {"base", "sub0"}
    with pytest.raises(TrainingError, match="3 weights for 2 models"):
        MultiModelLoss((1, 2, 3))(two, x, y)


def test_early_stop_and_the_best_weights() -> None:
    made = data()
    split = split_network()
    flat = Recipe(epochs=50, lr=1e-9, patience=2)
    history = finetune(split, made.train, made.val, flat, progress=False)
    assert len(history.epochs) == history.best + 2
    assert "no better accuracy in 2 epochs" in history.stopped
    assert evaluate(split, made.val).accuracy == history.accuracy


def test_frozen_norms_keep_their_statistics() -> None:
    made, split = data(), split_network()
    before = {key: v.clone() for key, v in split.named_buffers() if "running" in key}
    finetune(split, made.train, made.val, Recipe(epochs=1, frozen_norms=True, keep="last"), progress=False)
    after = dict(split.named_buffers())
    assert before
    assert all(torch.equal(before[key], after[key]) for key in before)
    finetune(split, made.train, made.val, Recipe(epochs=1, keep="last"), progress=False)
    after = dict(split.named_buffers())
    assert not any(torch.equal(before[key], after[key]) for key in before)


# ---------------------------------------------------------------- checkpoints


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    """Stopped after each epoch by an error of the user's, then gone on with."""
    made = data()
    recipe = Recipe(epochs=3, lr=0.05, keep="last", optimizer="adamw")
    whole = split_network()
    expected = finetune(whole, made.train, made.val, recipe, progress=False)

    class Enough(Exception):
        pass

    def stop(epoch: Any) -> None:
        raise Enough

    split = split_network()
    for _ in range(3):
        split = split_network()
        with pytest.raises(Enough):
            finetune(
                split, made.train, made.val, recipe, folder=tmp_path, resume=True, progress=False, on_epoch=stop
            )  # fmt: skip
    split = split_network()
    found = finetune(split, made.train, made.val, recipe, folder=tmp_path, resume=True, progress=False)
    assert same(weights(split), weights(whole))
    plain = lambda h: [(e.losses, e.val, e.rate) for e in h.epochs]  # noqa: E731
    assert plain(found) == plain(expected)
    assert (tmp_path / "metrics.csv").read_text().count("\n") == 5
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "tensorboard") == ["checkpoint.pt", "metrics.csv"]


def test_two_runs_at_once_in_one_folder_are_refused(tmp_path: Path) -> None:
    made, seen = data(), []

    def again(epoch: Any) -> None:
        with pytest.raises(TrainingError, match="another process trains in this folder now"):
            finetune(split_network(), made.train, made.val, QUICK, folder=tmp_path, resume=True, progress=False)
        seen.append(epoch)

    finetune(split_network(), made.train, made.val, QUICK, folder=tmp_path, progress=False, on_epoch=again)
    assert len(seen) == QUICK.epochs
    held = {one.name for one in tmp_path.iterdir()} - {"tensorboard"}  # its events, where it is installed
    assert held == {checkpoint.NAME, checkpoint.METRICS}
    finetune(split_network(), made.train, made.val, QUICK, folder=tmp_path, resume=True, progress=False)


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    made = data()
    finetune(split_network(), made.train, made.val, Recipe(epochs=1), folder=tmp_path, progress=False)
    run = lambda split, recipe, **more: finetune(  # noqa: E731
        split, made.train, made.val, recipe, folder=tmp_path, progress=False, **more
    )
    with pytest.raises(TrainingError, match="is not empty; go on with the run in it .resume=True"):
        run(split_network(), Recipe(epochs=1))
    with pytest.raises(TrainingError, match="another recipe: epochs is 1 there, 2 here"):
        run(split_network(), Recipe(epochs=2), resume=True)
    with pytest.raises(TrainingError, match="another model: .* is .* there, .* here"):
        run(network(width=4), Recipe(epochs=1), resume=True)
    other = data(200)
    with pytest.raises(TrainingError, match="another data: train is 240 there, 164 here"):
        finetune(
            split_network(), other.train, other.val, Recipe(epochs=1), folder=tmp_path, resume=True, progress=False
        )  # fmt: skip
    (tmp_path / "checkpoint.pt").write_bytes(b"no checkpoint")
    with pytest.raises(TrainingError, match="damaged, or no checkpoint of splitfx"):
        run(split_network(), Recipe(epochs=1), resume=True)


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = data()
    original = torch.save
    calls = []

    def full(*args: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        original(*args)

    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(
        TrainingError, match="epoch 2 cannot be written .*No space left.*; the checkpoint of epoch 1 is"
    ):
        finetune(split_network(), made.train, made.val, QUICK, folder=tmp_path, progress=False)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["epoch"] == 1
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "tensorboard") == ["checkpoint.pt", "metrics.csv"]
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(TrainingError, match="0 MiB are free"):
        finetune(split_network(), made.train, made.val, QUICK, folder=tmp_path / "other", progress=False)


def test_a_loss_that_is_not_finite_stops_with_the_best_weights(tmp_path: Path) -> None:
    made, split = data(), split_network()
    seen = []

    def loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        seen.append(1)
        value = nn.functional.cross_entropy(model(x), y)
        return value * float("nan") if len(seen) == 11 else value

    recipe = Recipe(epochs=3, batch_size=40, lr=0.05)
    with pytest.raises(TrainingError, match="epoch 2, step 5: the loss is not finite .loss nan"):
        finetune(split, made.train, made.val, recipe, loss=loss, folder=tmp_path, progress=False)
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert kept["epoch"] == 1
    assert same(weights(split), kept["best"]["model"])


# ---------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (Images(torch.zeros(0, 1, 12, 12), torch.zeros(0), ()), "the training set is empty"),
        (TensorDataset(torch.zeros(4, 3, 12, 12), torch.zeros(4, dtype=torch.int64)), "which the model does not take"),
        (TensorDataset(torch.zeros(4, 1, 12, 12), torch.full((4,), 6)), "class number 6, the model's head gives 6"),
        (TensorDataset(torch.zeros(4, 1, 12, 12), torch.zeros(4)), "second item is no class number"),
        (Images(torch.zeros(4, 1, 12, 12), torch.zeros(4), tuple("ab")), "has 2 classes, the model's head gives 6"),
        (TensorDataset(torch.zeros(4, 1, 12, 12)), "must be .input, class."),
    ],
)
def test_data_that_does_not_fit(train: Any, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        finetune(split_network(), train, data().val, QUICK, progress=False)
    if "training" in message:
        with pytest.raises(TrainingError, match="the validation set is empty"):
            finetune(split_network(), data().train, train, QUICK, progress=False)


def test_other_refusals() -> None:
    made = data()
    frozen = network().requires_grad_(False)
    with pytest.raises(TrainingError, match="no parameter of the model requires a gradient"):
        finetune(frozen, made.train, made.val, QUICK, progress=False)
    with pytest.raises(TrainingError, match="device is 'auto' or 'cpu', not 'gpu'"):
        finetune(network(), made.train, made.val, QUICK, device="gpu", progress=False)
    tuples = type("Tuples", (nn.Module,), {"forward": lambda self, x: (x, x)})
    with pytest.raises(TrainingError, match="not one tensor of class scores"):
        finetune(tuples(), made.train, made.val, QUICK, progress=False)
    vector = lambda model, x, y: nn.functional.cross_entropy(model(x), y, reduction="none")  # noqa: E731
    with pytest.raises(TrainingError, match="is a tensor of shape .32., not a scalar"):
        finetune(network(), made.train, made.val, QUICK, loss=vector, progress=False)
    assert issubclass(TrainingError, splitfx.SplitfxError)


class Bad(torch.utils.data.Dataset[Any]):
    """A training set whose sample ``number`` cannot be read."""

    def __init__(self, data: Any, number: int) -> None:
        self.data, self.number, self.classes = data, number, data.classes

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        if index == self.number:
            raise TrainingError("picture.png cannot be read as an image")
        return self.data[index]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_cannot_be_read_is_named_in_one_line(workers: int) -> None:
    """Also when another process reads it."""
    made = data(100)
    with pytest.raises(TrainingError) as caught:
        finetune(split_network(), Bad(made.train, 7), made.val, QUICK, workers=workers, progress=False)
    assert str(caught.value) == "picture.png cannot be read as an image"


def test_weights_that_diverge_in_the_last_step_of_an_epoch_are_not_kept(tmp_path: Path) -> None:
    """The loss of the step was finite; what the step made of the weights shows on the validation set."""
    made, split = data(), split_network()
    last = -(-len(made.train) // 32) * 2  # type: ignore[arg-type]
    seen = []

    class Last(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
            return value.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return grad * float("inf")

    def late(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        seen.append(1)
        found = nn.functional.cross_entropy(model(x), y)
        return Last.apply(found) if len(seen) == last else found  # type: ignore[no-any-return]

    with pytest.raises(TrainingError, match="epoch 2, after its last step: the validation loss is not finite"):
        finetune(split, made.train, made.val, QUICK, loss=late, folder=tmp_path, progress=False)
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert kept["epoch"] == 1
    assert same(weights(split), kept["best"]["model"])
    assert all(torch.isfinite(t).all() for t in kept["model"].values())


def test_a_run_is_gone_on_with_by_what_it_was_made_for(tmp_path: Path) -> None:
    """Shapes alone do not tell: another plan, teacher, loss or regulariser is another run."""
    made, model = data(), network()
    example = torch.zeros(1, 1, 12, 12)

    def run(gating: str = "strict", **more: Any) -> None:
        split = splitfx.transform(model, Group(factors=(2, 1), lowering="branches", gating=gating), example)  # type: ignore[arg-type]
        given = {"teacher": model, **more}
        finetune(split, made.train, made.val, Recipe(epochs=1), folder=tmp_path, resume=True, progress=False, **given)

    run()
    run()
    other = network()
    nn.init.zeros_(other[0].bias)  # type: ignore[index, arg-type]
    entropy = lambda split, x, y: nn.functional.cross_entropy(split(x), y)  # noqa: E731
    with pytest.raises(TrainingError, match=r"of another plan: 1. group gating is None there, relaxed here"):
        run("relaxed")
    for more, message in (
        ({"teacher": other}, "another objective: teacher is"),
        ({"teacher": None}, "another objective: teacher is .* there, none here"),
        ({"loss": entropy}, "another objective: loss is cross-entropy there, one of the user's here"),
        ({"regulariser": lambda: torch.zeros(())}, "another objective: regulariser is none there, a function here"),
    ):
        with pytest.raises(TrainingError, match=message):
            run(**more)  # type: ignore[arg-type]


def test_metrics_that_a_killed_run_did_not_come_to_are_written(tmp_path: Path) -> None:
    made = data()
    run = lambda: finetune(  # noqa: E731
        split_network(), made.train, made.val, QUICK, folder=tmp_path, resume=True, progress=False
    )
    whole = run().to_csv()
    (tmp_path / "metrics.csv").unlink()
    run()
    assert (tmp_path / "metrics.csv").read_text() == whole


def test_an_own_loss_does_not_excuse_the_validation_set() -> None:
    """Targets to train on may be of any kind then; accuracy is counted by classes always."""
    made = data()
    soft = TensorDataset(made.train.images, nn.functional.one_hot(made.train.targets, 6).float())  # type: ignore[attr-defined]
    loss = lambda split, x, y: nn.functional.cross_entropy(split(x), y)  # noqa: E731
    assert finetune(split_network(), soft, made.val, QUICK, loss=loss, progress=False).epochs
    with pytest.raises(TrainingError, match="the validation set's second item is no class number"):
        finetune(split_network(), made.train, soft, QUICK, loss=loss, progress=False)
    small = TensorDataset(torch.zeros(4, 3, 12, 12), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(TrainingError, match="the validation set gives inputs .* which the model does not take"):
        finetune(split_network(), made.train, small, QUICK, loss=loss, progress=False)


def test_class_numbers_below_0_and_unlisted_ones() -> None:
    made, x = data(), torch.zeros(4, 1, 12, 12)
    negative = TensorDataset(x, torch.tensor([-1, 0, 1, 2]))
    with pytest.raises(TrainingError, match="has class number -1, the model's head gives 6 classes, from 0 on"):
        finetune(split_network(), negative, made.val, QUICK, progress=False)
    late = TensorDataset(x, torch.tensor([0, 1, 2, 9]))  # the first samples do not show it
    with pytest.raises(TrainingError, match="validation: the model does not take a batch: Target 9 is out of bounds"):
        finetune(split_network(), made.train, late, QUICK, progress=False)
    with pytest.raises(TrainingError, match="the given set is empty"):
        evaluate(network(), Images(torch.zeros(0, 1, 12, 12), torch.zeros(0), ()))
    with pytest.raises(TrainingError, match="needs the folder of the run"):
        finetune(split_network(), made.train, made.val, QUICK, resume=True, progress=False)
