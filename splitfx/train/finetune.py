"""`finetune`: trains a split graph on one CPU, many GPUs or many hosts, and can be killed at any moment.

Hugging Face accelerate starts the processes' group, places tensors and scales mixed precision; which samples come when,
what is minimised and what is written is here. An epoch depends on the state at its start, the seed and its number alone
(`batches`), so going on from the last checkpoint gives what an uninterrupted run gives: the same weights on a CPU with
the same number of threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from splitfx.errors import MissingExtraError, TrainingError
from splitfx.graph import info, is_canonical
from splitfx.train import batches, checkpoint
from splitfx.train.batches import Process
from splitfx.train.history import Epoch, History, Score
from splitfx.train.objective import Loss, Objective, Regulariser, logits
from splitfx.train.recipe import Recipe

Data = Dataset[Any]
_NORMS = (nn.modules.batchnorm._BatchNorm,)


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
    progress: bool = True,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> History:
    """Train ``split`` in place and return what happened, epoch by epoch.

    ``train`` and ``val``: data sets with a length whose items are (input [C, H, W], class number). ``recipe``: a
    `Recipe` or the name of one. ``teacher``: the unsplit model, whose outputs the split learns to give (see `Recipe`);
    it is not changed. ``loss(split, inputs, targets)`` in place of cross-entropy; ``regulariser()`` is added to it, and
    a module's own parameters are trained along without decay. ``device``: "auto" takes the GPUs there are, "cpu".

    With a ``folder``, every epoch writes ``checkpoint.pt`` and ``metrics.csv`` there (and TensorBoard's events, where
    that is installed); with ``resume``, a run goes on after the last epoch that was finished, or begins. Under
    ``torchrun`` all processes train on one batch together, and the first writes. The folder must be one that all see.

    A model is in eval mode before and after, unless it was in train mode. Raises `TrainingError` for data that does not
    fit the model, for a loss that is not finite (the split then has its best weights), for a folder that holds another
    run and for a disk that is full; `MissingExtraError` without accelerate.
    """
    recipe = Recipe.named(recipe) if isinstance(recipe, str) else recipe
    run = _Run(split, train, val, recipe, Objective(split, recipe, teacher, loss, regulariser), workers, device)
    with batches.kept_generators(), _as_before(split):
        return run.history(None if folder is None else Path(folder), resume, progress, on_epoch)


def evaluate(model: nn.Module, data: Data, *, batch_size: int = 256, device: str = "auto", workers: int = 0) -> Score:
    """Accuracy in percent and mean cross-entropy of a classifier on a data set, in eval mode; see `finetune`."""
    run = _Run(model, data, data, Recipe(batch_size=batch_size), Objective(model, Recipe()), workers, device)
    with _as_before(model):
        run.place()
        return run.score(batch_size)


class _Run:
    """One run, in one of its processes."""

    def __init__(
        self, split: nn.Module, train: Data, val: Data, recipe: Recipe, objective: Objective, workers: int, device: str
    ) -> None:
        if device not in ("auto", "cpu"):
            raise TrainingError(f"device is 'auto' or 'cpu', not {device!r}; CUDA_VISIBLE_DEVICES chooses among GPUs")
        self.split, self.train, self.val, self.recipe, self.workers = split, train, val, recipe, workers
        self.objective = objective
        self.accelerator = _accelerator(recipe, device, unused=objective.loss is not None or _may_own_more(split))
        self.process = Process(self.accelerator.process_index, self.accelerator.num_processes)
        self.best: dict[str, torch.Tensor] = {}
        self.best_epoch = 0

    @property
    def writes(self) -> bool:
        return self.accelerator.is_main_process

    def place(self) -> None:
        self.split.to(self.accelerator.device)
        self.objective.follow(self.accelerator.device)

    # ------------------------------------------------------------ the run

    def history(self, folder: Path | None, resume: bool, progress: bool, on_epoch: Callable[[Epoch], None]) -> History:
        recipe = self.recipe
        check(self.split, self.train, self.val, own_loss=self.objective.loss is not None)
        about = checkpoint.About.of(recipe, self.split, train=batches.sized(self.train), val=batches.sized(self.val))
        if folder is not None and self.writes:
            checkpoint.prepare(folder, resume, self.split)
        self.accelerator.wait_for_everyone()
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
            self.first = before = self.score(recipe.batch_size)
            self.keep(0)
        stopped = "all epochs done"
        with _bar(self, progress and self.writes, len(done)) as tick, _board(folder, self.writes, len(done)) as log:
            for number in range(len(done) + 1, recipe.epochs + 1):
                if self.idle(before, done):
                    stopped = f"no better accuracy in {recipe.patience} epochs"
                    break
                epoch = self.epoch(number, objective, optimizer, tick)
                done.append(epoch)
                if epoch.val.accuracy > self.best_score(before, done[:-1]).accuracy:
                    self.best_epoch = number
                    self.keep(number)
                if folder is not None and self.writes:
                    self.write(folder, about, number, optimizer, before, done)
                    log(epoch)
                self.accelerator.wait_for_everyone()
                on_epoch(epoch)
        if recipe.keep == "best":
            self.split.load_state_dict(self.best)
        self.accelerator.free_memory()
        notes = () if self.objective.teacher or not _lost_connections(self.split) else (_NO_TEACHER,)
        return History(before, tuple(done), self.best_epoch, stopped, notes)

    def best_score(self, before: Score, done: list[Epoch]) -> Score:
        return before if self.best_epoch == 0 else done[self.best_epoch - 1].val

    def idle(self, before: Score, done: list[Epoch]) -> bool:
        return bool(self.recipe.patience) and len(done) - self.best_epoch >= self.recipe.patience

    def keep(self, number: int) -> None:
        """Remember the weights as the best so far."""
        self.best_epoch = number
        self.best = {key: t.detach().cpu().clone() for key, t in self.split.state_dict().items()}

    def epoch(self, number: int, objective: nn.Module, optimizer: Any, tick: Callable[[str], None]) -> Epoch:
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
            tick(f"epoch {number}/{recipe.epochs} loss {sum(losses.values()):.3f}")
        self.agree()
        total = int(self.accelerator.reduce(seen))
        means = {name: self.summed(value) / total for name, value in sums.items()}
        score = self.score(recipe.batch_size)
        return Epoch(number, recipe.rate(number), means, score, total, time.perf_counter() - started)

    def step(
        self, objective: nn.Module, optimizer: Any, inputs: Any, targets: Any, share: float, where: str
    ) -> dict[str, float]:
        """One step of the optimiser; the losses of this process's samples."""
        inputs, targets = _to(inputs, self.accelerator.device), _to(targets, self.accelerator.device)
        try:
            total, losses = objective(inputs, targets, share)
        except (IndexError, RuntimeError, ValueError) as error:
            raise TrainingError(f"{where}: the model or its loss failed: {str(error).splitlines()[0]}") from error
        # One answer for all processes: a lone one that stops would leave the others waiting.
        bad = self.accelerator.reduce((~torch.isfinite(total)).long())
        if int(bad):
            self.split.load_state_dict(self.best)
            parts = ", ".join(f"{name} {float(value):.4g}" for name, value in losses.items())
            raise TrainingError(
                f"{where}: the loss is not finite ({parts}). The split has its weights of epoch {self.best_epoch} "
                "again; try a lower lr, clip_norm, or warmup_epochs"
            )
        self.accelerator.backward(total)
        if self.recipe.clip_norm:
            self.accelerator.clip_grad_norm_(objective.parameters(), self.recipe.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return {name: float(value) for name, value in losses.items()}

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
    def score(self, batch_size: int) -> Score:
        """On the validation set, every sample once; with a loss of the user's, that one takes cross-entropy's place."""
        device = self.accelerator.device
        self.split.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=device)  # right, loss, samples
        for inputs, targets, _, size in batches.once(self.val, batch_size, self.process, self.workers):
            inputs, targets = _to(inputs, device), _to(targets, device)
            with self.accelerator.autocast():
                found = logits(self.split(inputs))
            right = (found.argmax(1) == targets).sum()
            sums += torch.stack(
                [right.double(), F.cross_entropy(found.double(), targets, reduction="sum"), right.new_tensor(size)]
            )
        right, loss, count = self.accelerator.reduce(sums).tolist()
        return Score(100 * right / count, loss / count, int(count))

    # ------------------------------------------------------------ what is written

    def write(
        self, folder: Path, about: checkpoint.About, number: int, optimizer: Any, before: Score, done: list[Epoch]
    ) -> None:
        scaler, regulariser = self.accelerator.scaler, self.objective.regulariser
        state = {
            "model": self.split.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "regulariser": regulariser.state_dict() if isinstance(regulariser, nn.Module) else None,
            "before": asdict(before),
            "epochs": [asdict(one) for one in done],
            "best": {"epoch": self.best_epoch, "model": self.best},
        }
        checkpoint.write(folder, about, number, state)
        stopped = "running" if number < self.recipe.epochs else "all epochs done"
        table = History(before, tuple(done), self.best_epoch, stopped).to_csv()
        checkpoint.write_text(folder / checkpoint.METRICS, table)

    def resumed(self, folder: Path, about: checkpoint.About, optimizer: Any) -> list[Epoch]:
        """Take everything from the last checkpoint; the epochs that it holds, none where there is no checkpoint."""
        state = checkpoint.read(folder, about)
        if state is None:
            return []
        self.split.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if isinstance(self.objective.regulariser, nn.Module):
            self.objective.regulariser.load_state_dict(state["regulariser"])
        self.best, self.best_epoch = state["best"]["model"], state["best"]["epoch"]
        self.first = Score(**state["before"])
        return [Epoch.from_dict(one) for one in state["epochs"]]


_NO_TEACHER = "trained without a teacher: give teacher=the unsplit model, and a few epochs reach more"


def check(split: nn.Module, train: Data, val: Data, *, own_loss: bool = False) -> None:
    """Refuse data that does not fit the model, on its first samples, before any work. Raises `TrainingError`."""
    for name, data in (("training", train), ("validation", val)):
        if batches.sized(data) == 0:
            raise TrainingError(f"the {name} set is empty")
    for name, data in (("training", train), ("validation", val)):
        inputs, targets, _, _ = next(batches.once(data, 2, Process(), 0))
        device = next((p.device for p in split.parameters()), torch.device("cpu"))
        modes = {m: m.training for m in split.modules()}
        try:
            with torch.no_grad():
                out = split.eval()(_to(inputs, device))
        except Exception as error:  # whatever a model says to an input of the wrong shape
            shape = list(inputs.shape[1:]) if isinstance(inputs, torch.Tensor) else type(inputs).__name__
            wanted = _wanted(split)
            raise TrainingError(
                f"the {name} set gives inputs {shape}, which the model does not take{wanted}: "
                f"{str(error).splitlines()[0]}"
            ) from error
        finally:
            for module, mode in modes.items():
                module.training = mode
        if own_loss:
            return
        classes = logits(out).shape[1]
        known = getattr(data, "classes", None)
        if known is not None and len(known) != classes:
            raise TrainingError(f"the {name} set has {len(known)} classes, the model's head gives {classes}")
        if not isinstance(targets, torch.Tensor) or targets.dim() != 1 or targets.dtype != torch.int64:
            raise TrainingError(f"the {name} set's second item is no class number")
        highest = _highest(data, targets)
        if highest >= classes:
            raise TrainingError(f"the {name} set has class number {highest}, the model's head gives {classes} classes")


def _highest(data: Data, first: torch.Tensor) -> int:
    """The highest class number, of all where the data set lists them, else of its first samples."""
    listed = getattr(data, "targets", None)
    known = torch.as_tensor(listed) if listed is not None and len(listed) else first
    return int(known.max())


def _wanted(split: nn.Module) -> str:
    if not is_canonical(split):
        return ""
    assert isinstance(split, fx.GraphModule)
    shapes = [list(one.shape[1:]) for one in info(split).inputs if hasattr(one, "shape")]
    return f" (it was traced with {', '.join(map(str, shapes))})"


def _lost_connections(split: nn.Module) -> bool:
    """Whether a pass that needs training has changed the graph."""
    if not is_canonical(split):
        return False
    assert isinstance(split, fx.GraphModule)
    return any(step.changed and step.promise == "retrain" for step in info(split).steps)


def _may_own_more(split: nn.Module) -> bool:
    """Whether there may be parameters that the output does not depend on; processes must know of them."""
    return not is_canonical(split) or bool(info(split).untouched)  # type: ignore[arg-type]


def _accelerator(recipe: Recipe, device: str, unused: bool) -> Any:
    try:
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs
    except ImportError as error:
        raise MissingExtraError(f"accelerate cannot be imported ({error}): pip install 'splitfx[train]'") from None
    try:
        return Accelerator(
            cpu=device == "cpu",
            mixed_precision=recipe.mixed_precision,
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=unused)],
        )
    except ValueError as error:
        raise TrainingError(f"this process trains with other settings already: {error}") from error


@contextmanager
def _as_before(model: nn.Module) -> Iterator[None]:
    """Modes and place of a model are the user's."""
    modes = {m: m.training for m in model.modules()}
    place = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    try:
        yield
    finally:
        model.to(place)
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _bar(run: _Run, shown: bool, done: int) -> Iterator[Callable[[str], None]]:
    from tqdm import tqdm

    count = batches.steps(batches.sized(run.train), run.recipe.batch_size, run.process)
    total = count * run.recipe.epochs
    with tqdm(total=total, initial=done * count, unit="step", disable=None if shown else True, leave=False) as bar:

        def tick(text: str) -> None:
            bar.set_description_str(text, refresh=False)
            bar.update()

        yield tick


@contextmanager
def _board(folder: Path | None, writes: bool, done: int) -> Iterator[Callable[[Epoch], None]]:
    """TensorBoard's events beside the other files, where it is installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        yield lambda epoch: None
        return
    if folder is None or not writes:
        yield lambda epoch: None
        return
    with SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1) as writer:

        def log(one: Epoch) -> None:
            figures = {"rate": one.rate, "val/loss": one.val.loss, "val/accuracy": one.val.accuracy}
            figures |= {f"train/{name}": value for name, value in one.losses.items()}
            for name, value in figures.items():
                writer.add_scalar(name, value, one.epoch)
            writer.flush()

        yield log


def _to(value: Any, device: torch.device) -> Any:
    from torch.utils import _pytree as pytree

    return pytree.tree_map_only(torch.Tensor, lambda t: t.to(device, non_blocking=True), value)
