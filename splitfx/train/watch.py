"""What one sees of a run afterwards, and while it goes on: TensorBoard's events, where that is installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from splitfx.errors import TrainingError
from splitfx.train.history import Epoch


@contextmanager
def board(folder: Path | None, done: list[Epoch]) -> Iterator[Callable[[Epoch], None]]:
    """A function that writes an epoch's figures into ``folder``/tensorboard; one that does nothing without a folder.

    The last epoch of those ``done`` is written again: a process that was killed may not have come to it.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        folder = None
    if folder is None:
        yield lambda epoch: None
        return
    place = folder / "tensorboard"
    writer = _written(place, lambda: SummaryWriter(str(place), purge_step=len(done) or None))

    def log(one: Epoch) -> None:
        figures = {"rate": one.rate, "val/loss": one.val.loss, "val/accuracy": one.val.accuracy}
        figures |= {f"train/{name}": value for name, value in one.losses.items()}
        for name, value in figures.items():
            writer.add_scalar(name, value, one.epoch)
        writer.flush()

    try:
        if done:
            _written(place, lambda: log(done[-1]))
        yield lambda one: _written(place, lambda: log(one))
    finally:
        _written(place, writer.close)


def _written(place: Path, write: Callable[[], Any]) -> Any:
    try:
        return write()
    except OSError as error:
        raise TrainingError(
            f"{place} cannot be written: {error.strerror or error}. The last checkpoint is whole: make room, and go on "
            "with resume=True (--resume)"
        ) from error
