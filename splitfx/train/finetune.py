"""`finetune`: trains a split graph on one CPU, many GPUs or many hosts, and can be killed at any moment.

Hugging Face accelerate starts the processes' group, places tensors and scales mixed precision; which samples come when,
what is minimised and what is written is here. An epoch depends on the state at its start, the seed and its number alone
(`batches`), so going on from the last checkpoint gives what an uninterrupted run gives: the same weights on a CPU with
the same number of threads.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from torch import fx, nn
from torch.nn import functional as F

from splitfx.errors import TrainingError
from splitfx.ground.progress import Clock, Say, say, told
from splitfx.ir.graph import info, is_canonical
from splitfx.ir.modes import kept_modes
from splitfx.text import first_line
from splitfx.train import checkpoint
from splitfx.train.data import batches
from splitfx.train.data.batches import Process
from splitfx.train.fit import Data, check, not_empty
from splitfx.train.history import Epoch, History, Score
from splitfx.train.objective import Loss, Objective, Regulariser, logits
from splitfx.train.processes import accelerated
from splitfx.train.recipe import Recipe
from splitfx.train.watch import board

_NORMS = (nn.modules.batchnorm._BatchNorm,)


@told
def finetune(
    split: nn.Module,
    train: Data,
    val: Data,
    recipe: Recipe | str = "finetune",
    *,
    teacher: nn.Module | None = None,
    loss: Loss | None = None,
    regulariser: Regulariser | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    workers: int = 0,
    device: str = "auto",
    progress: Say = True,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> History:
    """Train ``split`` in place and return what happened, epoch by epoch.

    ``train`` and ``val``: data sets with a length whose items are (input [C, H, W], class number). ``recipe``: a
    `Recipe` or the name of one. ``teacher``: the unsplit model, whose outputs the split learns to give (see `Recipe`);
    it is not changed. ``loss(split, inputs, targets)`` in place of cross-entropy; ``regulariser()`` is added to it, and
    a module's own parameters are trained along without decay, and end as of the epoch whose weights are kept.
    ``device``: "auto" takes the GPUs there are, "cpu".

    With a ``folder``, every epoch writes ``checkpoint.pt`` and ``metrics.csv`` there (and TensorBoard's events, where
    that is installed); with ``resume``, a run goes on after the last epoch that was finished, or begins. Under
    ``torchrun`` all processes train on one batch together, and the first writes. The folder must be one that all see.

    A model is in eval mode before and after, unless it was in train mode. Raises `TrainingError` for data that does not
    fit the model, for a loss that is not finite (the split then has its best weights), for a folder that holds another
    run and for a disk that is full; `MissingExtraError` without accelerate.
    """
    recipe = Recipe.named(recipe) if isinstance(recipe, str) else recipe
    if resume and folder is None:
        raise TrainingError("resume=True needs the folder of the run that is gone on with")
    objective = Objective(split, recipe, teacher, loss, regulariser)
    unused = loss is not None or _may_own_more(split)
    with (
        accelerated(recipe.mixed_precision, device, unused) as accelerator,
        batches.kept_generators(),
        _as_before(split),
    ):
        run = _Run(split, train, val, recipe, objective, workers, accelerator)
        return run.history(None if folder is None else Path(folder), resume, on_epoch)


@told
def evaluate(
    model: nn.Module,
    data: Data,
    *,
    batch_size: int = 256,
    device: str = "auto",
    workers: int = 0,
    mixed_precision: Literal["no", "fp16", "bf16"] = "no",
    progress: Say = True,
) -> Score:
    """Accuracy in percent and mean cross-entropy of a classifier on a data set, in eval mode; see `finetune`."""
    not_empty("given", data)
    say("measuring accuracy")
    recipe = Recipe(batch_size=batch_size, mixed_precision=mixed_precision)
    with accelerated(mixed_precision, device, unused=False) as accelerator, _as_before(model):
        run = _Run(model, data, data, recipe, Objective(model, recipe), workers, accelerator)
        run.place()
        return run.score()


class _Run:
    """One run, in one of its processes."""

    def __init__(
        self,
        split: nn.Module,
        train: Data,
        val: Data,
        recipe: Recipe,
        objective: Objective,
        workers: int,
        accelerator: Any,
    ) -> None:
        self.split, self.train, self.val, self.recipe, self.workers = split, train, val, recipe, workers
        self.objective, self.accelerator = objective, accelerator
        self.process = Process(self.accelerator.process_index, self.accelerator.num_processes)
        self.best: dict[str, dict[str, torch.Tensor]] = {}
        self.best_epoch = 0

    @property
    def writes(self) -> bool:
        return self.accelerator.is_main_process

    def place(self) -> None:
        self.split.to(self.accelerator.device)
        self.objective.follow(self.accelerator.device)

    # ------------------------------------------------------------ the run

    def history(self, folder: Path | None, resume: bool, on_epoch: Callable[[Epoch], None]) -> History:
        check(self.split, self.train, self.val, own_loss=self.objective.loss is not None)
        about = self.about()
        with checkpoint.opened(folder, resume, self.split) if folder and self.writes else nullcontext():
            self.accelerator.wait_for_everyone()
            return self.trained(folder, resume, on_epoch, about)

    def trained(
        self,
        folder: Path | None,
        resume: bool,
        on_epoch: Callable[[Epoch], None],
        about: checkpoint.About,
    ) -> History:
        recipe = self.recipe
        self.place()
        weights = [p for p in self.split.parameters() if p.requires_grad]
        if not weights:
            raise TrainingError("no parameter of the model requires a gradient: nothing can be trained")
        optimizer = recipe.make_optimizer(weights, self.objective.free())
        objective, optimizer = self.accelerator.prepare(self.objective, optimizer)
        done = self.resumed(folder, about, optimizer) if resume and folder is not None else []
        if done:
            before = self.first
        else:
            self.first = before = self.score()
            self.keep(0)
        stopped = "all epochs done"
        own = folder if self.writes else None
        if done and own is not None:
            self.write_metrics(own, before, done)  # a process that was killed may not have come to it
        steps = batches.steps(batches.sized(self.train), recipe.batch_size, self.process)
        clock = Clock("training", steps * recipe.epochs, steps * len(done))
        with board(own, done) as log:
            for number in range(len(done) + 1, recipe.epochs + 1):
                if self.idle(before, done):
                    stopped = f"no better accuracy in {recipe.patience} epochs"
                    break
                epoch = self.epoch(number, objective, optimizer, clock)
                done.append(epoch)
                if epoch.val.accuracy > self.best_score(before, done[:-1]).accuracy:
                    self.best_epoch = number
                    self.keep(number)
                if own is not None:
                    self.write(own, about, number, optimizer, before, done)
                    self.write_metrics(own, before, done)
                    log(epoch)
                self.accelerator.wait_for_everyone()
                on_epoch(epoch)
        if recipe.keep == "best":
            self.go_back()
        self.accelerator.free_memory()
        notes = () if self.objective.teacher or not _lost_connections(self.split) else (_NO_TEACHER,)
        return History(before, tuple(done), self.best_epoch, stopped, notes)

    def best_score(self, before: Score, done: list[Epoch]) -> Score:
        return before if self.best_epoch == 0 else done[self.best_epoch - 1].val

    def idle(self, before: Score, done: list[Epoch]) -> bool:
        return bool(self.recipe.patience) and len(done) - self.best_epoch >= self.recipe.patience

    def keep(self, number: int) -> None:
        """Remember the weights as the best so far, a regulariser's with them: they belong together."""
        self.best_epoch = number
        self.best = {
            name: {key: t.detach().cpu().clone() for key, t in module.state_dict().items()}
            for name, module in self.modules().items()
        }

    def go_back(self) -> None:
        """The best weights again."""
        for name, module in self.modules().items():
            module.load_state_dict(self.best[name])

    def modules(self) -> dict[str, nn.Module]:
        """All that is trained."""
        added = self.objective.regulariser
        return {"model": self.split} | ({"regulariser": added} if isinstance(added, nn.Module) else {})

    def epoch(self, number: int, objective: nn.Module, optimizer: Any, clock: Clock) -> Epoch:
        recipe, started = self.recipe, time.perf_counter()
        seed = batches.seeded(recipe.seed, number, self.process)
        self.train_mode()
        count = batches.steps(batches.sized(self.train), recipe.batch_size, self.process)
        sums: dict[str, torch.Tensor] = {}
        seen = torch.zeros((), dtype=torch.int64, device=self.accelerator.device)
        for step, (inputs, targets, share, size) in enumerate(
            batches.epoch(self.train, recipe.batch_size, seed, self.process, self.workers)
        ):
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate(number, step / count)
            losses = self.step(objective, optimizer, inputs, targets, share, f"epoch {number}, step {step + 1}")
            for name, value in losses.items():
                sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + value * size
            seen += size
            clock.tick(f"epoch {number} of {recipe.epochs}, loss {sum(losses.values()):.3f}")
        self.agree()
        total = int(self.accelerator.reduce(seen))
        means = {name: self.summed(value) / total for name, value in sums.items()}
        score = self.score()
        if not math.isfinite(score.loss):  # of the last step; a checkpoint of such weights would be of no use
            self.diverged(f"epoch {number}, after its last step", "the validation loss", f"{score.loss:.4g}")
        return Epoch(number, recipe.rate(number), means, score, total, time.perf_counter() - started)

    def step(
        self, objective: nn.Module, optimizer: Any, inputs: Any, targets: Any, share: float, where: str
    ) -> dict[str, float]:
        """One step of the optimiser; the losses of this process's samples."""
        inputs, targets = batches.to(inputs, self.accelerator.device), batches.to(targets, self.accelerator.device)
        try:
            total, losses = objective(inputs, targets, share)
        except (IndexError, RuntimeError, ValueError) as error:
            raise TrainingError(f"{where}: the model or its loss failed: {first_line(error)}") from error
        # One answer for all processes: a lone one that stops would leave the others waiting.
        bad = self.accelerator.reduce((~torch.isfinite(total)).long())
        if int(bad):
            self.diverged(where, "the loss", ", ".join(f"{name} {float(v):.4g}" for name, v in losses.items()))
        self.accelerator.backward(total)
        if self.recipe.clip_norm:
            self.accelerator.clip_grad_norm_(objective.parameters(), self.recipe.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return {name: float(value) for name, value in losses.items()}

    def diverged(self, where: str, what: str, value: str) -> NoReturn:
        self.go_back()
        raise TrainingError(
            f"{where}: {what} is not finite ({value}). The split has its weights of epoch {self.best_epoch} again; "
            "begin in another folder with a lower lr, with clip_norm or warmup_epochs"
        )

    def train_mode(self) -> None:
        self.split.train()
        if self.recipe.frozen_norms:
            for module in self.split.modules():
                if isinstance(module, _NORMS):
                    module.eval()

    def agree(self) -> None:
        """Running statistics differ between processes after a step; those of the first hold."""
        if self.process.count > 1:
            from accelerate.utils import broadcast

            for buffer in self.split.buffers():
                buffer.copy_(broadcast(buffer))

    def summed(self, value: torch.Tensor) -> float:
        return float(self.accelerator.reduce(value.to(self.accelerator.device)))

    @torch.no_grad()
    def score(self) -> Score:
        """Accuracy and cross-entropy of the class scores on the validation set, every sample once, whatever loss is
        trained with."""
        device = self.accelerator.device
        self.split.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=device)  # right, loss, samples
        for inputs, targets, _, size in batches.once(self.val, self.recipe.batch_size, self.process, self.workers):
            inputs, targets = batches.to(inputs, device), batches.to(targets, device)
            try:
                with self.accelerator.autocast():
                    found = logits(self.split(inputs))
                loss = F.cross_entropy(found.double(), targets, reduction="sum")
            except (IndexError, RuntimeError, ValueError) as error:
                raise TrainingError(f"validation: the model does not take a batch: {first_line(error)}") from error
            right = (found.argmax(1) == targets).sum()
            sums += torch.stack([right.double(), loss, right.new_tensor(size)])
        right, loss, count = self.accelerator.reduce(sums).tolist()
        return Score(100 * right / count, loss / count, int(count))

    # ------------------------------------------------------------ what is written

    def about(self) -> checkpoint.About:
        sizes = {"train": batches.sized(self.train), "val": batches.sized(self.val)}
        return checkpoint.About.of(self.recipe, self.split, sizes, self.objective)

    def write(
        self, folder: Path, about: checkpoint.About, number: int, optimizer: Any, before: Score, done: list[Epoch]
    ) -> None:
        scaler = self.accelerator.scaler
        state = {
            **{name: module.state_dict() for name, module in self.modules().items()},
            "optimizer": optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "before": asdict(before),
            "epochs": [asdict(one) for one in done],
            "best": {"epoch": self.best_epoch, **self.best},
        }
        checkpoint.write(folder, about, number, state)

    def write_metrics(self, folder: Path, before: Score, done: list[Epoch]) -> None:
        checkpoint.write_metrics(folder, History(before, tuple(done), self.best_epoch, "").to_csv(), len(done))

    def resumed(self, folder: Path, about: checkpoint.About, optimizer: Any) -> list[Epoch]:
        """Take everything from the last checkpoint; the epochs that it holds, none where there is no checkpoint."""
        stored = checkpoint.read(folder, about)
        if stored is None:
            return []
        checkpoint.require_fit(folder, stored, self.modules(), optimizer, self.accelerator.scaler)
        for name, module in self.modules().items():
            module.load_state_dict(stored.modules[name])
        optimizer.load_state_dict(stored.optimizer)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(stored.scaler)
        self.best_epoch = stored.best["epoch"]
        self.best = {name: stored.best[name] for name in self.modules()}
        self.first = stored.before
        return stored.epochs


_NO_TEACHER = "trained without a teacher: give teacher=the unsplit model, and a few epochs reach more"


def _lost_connections(split: nn.Module) -> bool:
    """Whether a pass that needs training has changed the graph."""
    if not is_canonical(split):
        return False
    assert isinstance(split, fx.GraphModule)
    return any(step.changed and step.promise == "retrain" for step in info(split).steps)


def _may_own_more(split: nn.Module) -> bool:
    """Whether there may be parameters that the output does not depend on; processes must know of them."""
    return not is_canonical(split) or bool(info(split).untouched)


@contextmanager
def _as_before(model: nn.Module) -> Iterator[None]:
    """Modes and place of a model are the user's."""
    place = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    with kept_modes(model):
        try:
            yield
        finally:
            model.to(place)
