"""What a run did, epoch by epoch: as a table, as CSV, as JSON."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict, dataclass

from splitfx.ground.notebook import Shown
from splitfx.ground.table import table


@dataclass(frozen=True)
class Score:
    """How well a model classifies: ``accuracy`` in percent, the mean cross-entropy ``loss``, ``samples`` seen."""

    accuracy: float
    loss: float
    samples: int


@dataclass(frozen=True)
class Epoch:
    """One epoch: ``losses`` are means over its samples, by name; ``samples`` those trained on by all processes."""

    epoch: int
    rate: float
    losses: dict[str, float]
    val: Score
    samples: int
    seconds: float

    @property
    def loss(self) -> float:
        return sum(self.losses.values())


@dataclass(frozen=True)
class History(Shown):
    """A run: the score before it, its epochs, the number of the best (0: the start), and why it ended."""

    before: Score
    epochs: tuple[Epoch, ...]
    best: int
    stopped: str
    notes: tuple[str, ...] = ()

    @property
    def accuracy(self) -> float:
        """The best validation accuracy, in percent."""
        return self.score(self.best).accuracy

    def score(self, epoch: int) -> Score:
        """The validation score after an epoch; 0 is before the first."""
        return self.before if epoch == 0 else self.epochs[epoch - 1].val

    def to_csv(self) -> str:
        """One line per epoch, the start as epoch 0."""
        names = list(dict.fromkeys(name for one in self.epochs for name in one.losses))
        out = io.StringIO()
        write = csv.writer(out, lineterminator="\n").writerow
        write(["epoch", "rate", *names, "val_loss", "val_accuracy", "samples", "seconds"])
        write([0, "", *("" for _ in names), self.before.loss, self.before.accuracy, 0, 0])
        for one in self.epochs:
            parts = [one.losses.get(name, "") for name in names]
            write([one.epoch, one.rate, *parts, one.val.loss, one.val.accuracy, one.samples, round(one.seconds, 3)])
        return out.getvalue()

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "accuracy": self.accuracy}, indent=2)

    def __str__(self) -> str:
        names = list(dict.fromkeys(name for one in self.epochs for name in one.losses))
        head = ["epoch", "rate", *names, "val loss", "val accuracy", "time"]
        rows: list[list[object]] = [
            ["start", None, *(None for _ in names), f"{self.before.loss:.4f}", f"{self.before.accuracy:.2f} %", None]
        ]
        for one in self.epochs:
            parts = [f"{one.losses[name]:.4f}" if name in one.losses else None for name in names]
            mark = " *" if one.epoch == self.best else ""
            rows.append(
                [f"{one.epoch}{mark}", f"{one.rate:.2g}", *parts, f"{one.val.loss:.4f}", f"{one.val.accuracy:.2f} %",
                 f"{one.seconds:.1f} s"]
            )  # fmt: skip
        best = f"best: epoch {self.best}" if self.best else "best: the start"
        return "\n".join([table(head, rows), "", f"{best}, {self.accuracy:.2f} %; {self.stopped}", *self.notes])
