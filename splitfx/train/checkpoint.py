"""The state of a run after an epoch, in one file that is there whole or as it was.

A checkpoint is read with ``weights_only``: it is data, whoever wrote it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from msgspec import Struct
from torch import fx, nn

from splitfx.errors import TrainingError
from splitfx.ground.digest import digest
from splitfx.ground.files import written_whole
from splitfx.ground.files.drafts import sweep
from splitfx.ground.files.typed import Count, reason, require_ordinary
from splitfx.ir.graph import info, is_canonical
from splitfx.text import first_line, one_line, shown
from splitfx.train.history import Epoch, Score
from splitfx.train.objective import Objective
from splitfx.train.recipe import Recipe

FORMAT = 3
NAME = "checkpoint.pt"
METRICS, LOCK = "metrics.csv", ".lock"
ROOM_FIRST = "Make room, then go on with resume=True (--resume)"
ROOM = 3  # checkpoints that must fit on the disk: the old one, the new one, and some air

State = dict[str, Any]


@dataclass(frozen=True)
class About:
    """What a checkpoint belongs to; a run of anything else is not resumed from it."""

    recipe: dict[str, Any]
    model: dict[str, list[int]]  # state_dict key -> shape
    plan: dict[str, Any]  # what made the split, as far as that is known: shapes do not tell how channels are ordered
    data: dict[str, int]  # samples by split
    objective: dict[str, Any]  # what is minimised beside the recipe

    @staticmethod
    def of(recipe: Recipe, model: nn.Module, data: dict[str, int], objective: Objective) -> About:
        own, teacher, added = objective.loss, objective.teacher, objective.regulariser
        minimised = {
            "loss": "cross-entropy" if own is None else "one of the user's",
            "teacher": digest(teacher[0].state_dict()) if teacher else "none",
            "regulariser": "none"
            if added is None
            else _shapes(added)
            if isinstance(added, nn.Module)
            else "a function",
        }
        return About(plain(recipe), _shapes(model), _plan(model), data, minimised)

    def differs(self, other: dict[str, Any]) -> str:
        """What is different in another one, or ""."""
        if self.model != other["model"]:
            keys = self.model.keys() | other["model"].keys()
            key = min(k for k in keys if self.model.get(k) != other["model"].get(k))
            shape = lambda found: _said(found) if found is not None else "missing"  # noqa: E731
            return f"another model: {key} is {shape(other['model'].get(key))} there, {shape(self.model.get(key))} here"
        for kind in ("plan", "recipe", "data", "objective"):
            mine, theirs = getattr(self, kind), other[kind]
            for key in dict.fromkeys([*mine, *theirs]):
                if mine.get(key) != theirs.get(key):
                    return f"another {kind}: {key} is {_said(theirs.get(key))} there, {_said(mine.get(key))} here"
        return ""


def _said(value: Any) -> str:
    return one_line(str(value), 120)


def plain(recipe: Recipe) -> dict[str, Any]:
    return {key: list(one) if isinstance(one, tuple) else one for key, one in asdict(recipe).items()}


def _shapes(module: nn.Module) -> dict[str, list[int]]:
    return {key: list(t.shape) for key, t in module.state_dict().items()}


def _plan(model: nn.Module) -> dict[str, Any]:
    if not is_canonical(model):
        return {}
    assert isinstance(model, fx.GraphModule)
    steps = [step for step in info(model).steps if step.changed]
    options = {f"{i + 1}. {one.name} {key}": value for i, one in enumerate(steps) for key, value in one.options.items()}
    return json.loads(json.dumps(options))  # as it is read back: a tuple is a list


def open_folder(folder: Path, resume: bool, what: str) -> None:
    """Make the folder of a run or a search; one with files in it only to go on. Raises `TrainingError`."""
    if folder.exists() and not folder.is_dir():
        raise TrainingError(f"{folder} is a file; a {what} is written into a folder")
    # Several processes of one run look here, and the first may hold its lock already.
    if not resume and folder.is_dir() and any(one.name != LOCK for one in folder.iterdir()):
        raise TrainingError(
            f"{folder} is not empty; go on with the {what} in it (resume=True, --resume) or choose another"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"{folder}: cannot be made: {error.strerror or error}") from error


@contextmanager
def opened(folder: Path, resume: bool, model: nn.Module) -> Iterator[None]:
    """Open the folder of a run for one process alone; refuse a disk without room before any work. The lock is the
    operating system's: a process that is killed gives it back. Raises `TrainingError`."""
    from filelock import FileLock, Timeout

    open_folder(folder, resume, "run")
    lock = FileLock(str(folder / LOCK), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise TrainingError(
            f"{folder}: another process trains in this folder now; wait for it, or choose another"
        ) from None
    try:
        _prepare(folder, model)
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        lock.release()


def _prepare(folder: Path, model: nn.Module) -> None:
    sweep(folder)  # what a killed process was writing
    need = ROOM * 3 * sum(t.numel() * t.element_size() for t in model.state_dict().values())
    free = shutil.disk_usage(folder).free
    if free < need:
        raise TrainingError(
            f"{folder}: {free / 2**20:.0f} MiB are free, a run of this model needs {need / 2**20:.0f} MiB; make "
            "room, or choose a folder on another disk"
        )


def write(folder: Path, about: About, epoch: int, state: State) -> None:
    """Replace the checkpoint by that of ``epoch``. Raises `TrainingError`; the one before is kept."""
    path = folder / NAME
    try:
        with written_whole(path, overwrite=True, error=TrainingError) as draft:
            torch.save({"format": FORMAT, "about": asdict(about), "epoch": epoch, **state}, draft)
    except (TrainingError, RuntimeError) as error:  # torch's writer has its own words for a full disk
        kept = f"the checkpoint of epoch {epoch - 1} is kept" if path.exists() else "there is no checkpoint before it"
        raise TrainingError(
            f"{path}: the checkpoint of epoch {epoch} cannot be written ({_cause(error)}); {kept}. {ROOM_FIRST}"
        ) from error


def write_metrics(folder: Path, table: str, epoch: int) -> None:
    """Replace the table of epochs. Raises `TrainingError`."""
    path = folder / METRICS
    try:
        write_text(path, table)
    except TrainingError as error:
        raise TrainingError(
            f"{path} cannot be written ({_cause(error)}); the checkpoint of epoch {epoch} is whole. {ROOM_FIRST}"
        ) from error


def _cause(error: Exception) -> str:
    """Why a file could not be written, in the operating system's words where it has some."""
    known: BaseException | None = error
    while known is not None:
        if isinstance(known, OSError) and known.strerror:
            return known.strerror
        known = known.__cause__ or known.__context__
    return f"is the disk full? {first_line(error)}"


class Stored(Struct):
    """A checkpoint as it was written; `fitting` looks at the tensors."""

    about: About
    epoch: Count
    optimizer: dict[str, Any]
    scaler: dict[str, Any] | None
    before: Score
    epochs: list[Epoch]
    best: dict[str, Any]
    modules: dict[str, dict[str, Any]]

    def __post_init__(self) -> None:
        require_ordinary([asdict(self.about), asdict(self.before), *map(asdict, self.epochs)])
        numbers = [one.epoch for one in self.epochs]
        if numbers != list(range(1, self.epoch + 1)):
            raise ValueError(f"it is of epoch {self.epoch} and knows {len(numbers)}")
        if type(self.best.get("epoch")) is not int or not 0 <= self.best["epoch"] <= self.epoch:
            raise ValueError("its best epoch is none that it knows")


def read(folder: Path, about: About) -> Stored | None:
    """The checkpoint in a folder, None where there is none yet. Raises `TrainingError` for one of another run."""
    path = folder / NAME
    if not path.exists():
        return None
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        number = found.pop("format")
        known = {key: found.pop(key) for key in Stored.__struct_fields__ if key in found}
        stored = msgspec.convert({**known, "modules": found}, Stored) if number == FORMAT else None
    except Exception as error:  # whatever a damaged file makes of torch's reader
        why = f" ({reason(error)})" if isinstance(error, msgspec.ValidationError) else ""
        raise TrainingError(f"{path} cannot be read: it is damaged, or no checkpoint of splitfx{why}") from error
    if stored is None:
        raise TrainingError(f"{path} has format {shown(number)}, this splitfx reads {FORMAT}")
    different = about.differs(asdict(stored.about))
    if different:
        raise TrainingError(f"{path} is of {different}; choose another folder, or go on with what it was made for")
    return stored


def require_fit(
    folder: Path, stored: Stored, modules: Mapping[str, nn.Module], optimizer: Any, scaler: Any = None
) -> None:
    """Raise `TrainingError` where a checkpoint's tensors and settings are not those of what is trained."""
    try:
        for name, module in modules.items():
            _require_state(name, stored.modules.get(name), module)
            _require_state(f"the best {name}", stored.best.get(name), module)
        _require_optimizer(stored.optimizer, optimizer)
        if scaler is not None:
            _require_scaler(stored.scaler, scaler.state_dict())
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise TrainingError(
            f"{folder / NAME} is damaged ({one_line(str(error), 300)}); begin in another folder"
        ) from error


def _require_state(what: str, given: Any, module: nn.Module) -> None:
    own = module.state_dict()
    if not isinstance(given, Mapping) or list(given) != list(own):
        raise ValueError(f"{what} has other tensors")
    wrong = next((key for key, one in own.items() if not _is_like(given[key], one)), None)
    if wrong is not None:
        raise ValueError(f"{what}: {wrong} is no tensor of {list(own[wrong].shape)} in {own[wrong].dtype}")


def _is_like(given: Any, own: torch.Tensor) -> bool:
    plain = isinstance(given, torch.Tensor) and given.layout is torch.strided and given.device.type == "cpu"
    return plain and given.shape == own.shape and given.dtype == own.dtype


_KEPT = {"SGD": ["momentum_buffer"], "AdamW": ["step", "exp_avg", "exp_avg_sq"]}  # by an optimiser, of each weight


def _require_optimizer(given: dict[str, Any], optimizer: Any) -> None:
    own = optimizer.state_dict()["param_groups"]
    weights = [one for group in optimizer.param_groups for one in group["params"]]
    groups = [dict(one) for one in given["param_groups"]]
    rates = [group.pop("lr", None) for group in groups]
    settings = [{key: one for key, one in group.items() if key != "lr"} for group in own]
    require_ordinary(groups)
    if groups != settings or not all(isinstance(rate, float | int) and 0 <= rate < 1e30 for rate in rates):
        raise ValueError("the optimiser has other settings")
    kind = next(name for name in _KEPT if name in {base.__name__ for base in _kinds(optimizer)})
    for place, held in given["state"].items():
        known = isinstance(held, dict) and (not held or list(held) == _KEPT[kind])
        if type(place) is not int or not 0 <= place < len(weights) or not known:
            raise ValueError(f"the optimiser knows a weight {shown(place)}")
        for name, one in held.items():
            like = torch.zeros((), dtype=torch.float32) if name == "step" else weights[place].detach()
            if one is not None and not (isinstance(one, torch.Tensor) and _is_like(one, like.cpu())):
                raise ValueError(f"the optimiser's {name} of weight {place} is no tensor of {list(like.shape)}")
        if kind == "AdamW" and None in held.values():
            raise ValueError(f"the optimiser has no averages of weight {place}")


def _require_scaler(given: dict[str, Any] | None, own: dict[str, Any]) -> None:
    require_ordinary(given)
    if given is None or list(given) != list(own) or not all(type(given[key]) is type(own[key]) for key in own):
        raise ValueError("the scaler of mixed precision has other settings")


def _kinds(optimizer: Any) -> tuple[type, ...]:
    return type(getattr(optimizer, "optimizer", optimizer)).__mro__  # accelerate wraps it


def write_text(path: Path, text: str) -> None:
    with written_whole(path, overwrite=True, error=TrainingError) as draft:
        draft.write_text(text, encoding="utf-8")
