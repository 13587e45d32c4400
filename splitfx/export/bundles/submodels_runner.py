"""Bundle: the models of a folder that `export_bundle` wrote; each call takes the best that meets its deadline.

Sessions are opened when they are first needed. How long a model takes is what it took on this machine: `warm_up`
measures all models for inputs of a size, and every call adds to it. A deadline that no model meets is answered by the
fastest, and the answer says that it is late. Refused (`UnsupportedError`): such a deadline with ``late="refuse"``;
sizes of inputs for which nothing is known. `ExportError`: a
folder that is no bundle, or is damaged.
"""

from __future__ import annotations

import os
import statistics
from collections import Counter, deque
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from msgspec import Meta, Struct

from splitfx.errors import ExportError, UnsupportedError
from splitfx.export.bundles.opened import Opened
from splitfx.ground.files.folders import FolderKind
from splitfx.ground.files.typed import Count, Text
from splitfx.ground.table import number, seconds, size, table
from splitfx.ground.timing import p90
from splitfx.text import shown

REMEMBERED = 50  # latest calls of a model that its time is judged by
Sizes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class BundleModel:
    """One model of a manifest, as written: ``accuracy`` in percent, ``seconds`` a median, ``max_rel`` the largest
    error against its torch model. ``behind``: the layer at which a sub-model enters."""

    name: Text
    file: Text
    macs: Count
    params: Count
    peak_bytes: Count
    seconds: Annotated[float, Meta(ge=0)] | None
    accuracy: Annotated[float, Meta(ge=0, le=100)] | None
    behind: str = ""
    ops: Count = 0
    runtime_peak_bytes: int | None = None
    p90_seconds: float | None = None
    max_rel: float = 0.0


class Weights(Struct):
    file: Text
    bytes: Count


class Manifest(Struct):
    models: Annotated[list[BundleModel], Meta(min_length=1)]
    weights: Weights
    model: str = ""
    inputs: list[tuple[int, ...]] = []
    provider: str = ""
    threads: int = 0

    def __post_init__(self) -> None:
        twice = next((name for name, count in Counter(one.name for one in self.models).items() if count > 1), None)
        if twice is not None:
            raise ValueError(f"two models are named {shown(twice)}")


KIND = FolderKind("export_bundle", "manifest.json", 1, ExportError, Manifest)


@dataclass(frozen=True)
class Answer:
    """The outputs of one call, which model gave them, how long it took, and whether that was within the deadline."""

    outputs: tuple[torch.Tensor, ...]
    model: str
    seconds: float
    met: bool


class Bundle:
    """Opens a bundle on one provider. ``threads``: of onnxruntime, None for torch's number."""

    def __init__(self, folder: str | os.PathLike[str], provider: str = "cpu", threads: int | None = None) -> None:
        self._opened = Opened(KIND, folder, provider, threads)
        self.folder, about = self._opened.folder, self._opened.about
        self.models = tuple(about.models)
        for one in self.models:
            KIND.held_file(self.folder, one.file, 1)
        KIND.held_file(self.folder, about.weights.file, about.weights.bytes)
        self._times: dict[tuple[str, Sizes], deque[float]] = {}

    # ------------------------------------------------------------ running

    def run(
        self, *inputs: torch.Tensor, deadline: float | None = None, late: Literal["fastest", "refuse"] = "fastest"
    ) -> Answer:
        """Run the best model whose time is within ``deadline`` seconds; without one, the best model.

        The best is the one with the highest accuracy, or with the most MACs where accuracies are not known. ``late``:
        what to do where no model is fast enough: run the "fastest", whose answer has ``met=False``, or "refuse".
        """
        name = self.pick(*inputs, deadline=deadline, late=late)
        answer, took = self._timed(name, inputs)
        self._remember(name, inputs, took)
        return Answer(answer, name, took, deadline is None or took <= deadline)

    def pick(
        self, *inputs: torch.Tensor, deadline: float | None = None, late: Literal["fastest", "refuse"] = "fastest"
    ) -> str:
        """The name of the model that `run` would take."""
        if late not in ("refuse", "fastest"):
            raise UnsupportedError(f"late is 'refuse' or 'fastest', not {late!r}")
        if deadline is None:
            return self._best(list(self.models)).name
        times = {one.name: self.seconds(one.name, *inputs) for one in self.models}
        fits = [one for one in self.models if times[one.name] <= deadline]
        fastest = min(times, key=lambda name: times[name])
        if fits:
            return self._best(fits).name
        if late == "fastest":
            return fastest
        raise UnsupportedError(
            f"no model meets a deadline of {seconds(deadline)}: the fastest is {fastest} with "
            f"{seconds(times[fastest])}; leave late='refuse' out to run it all the same"
        )

    def warm_up(self, *inputs: torch.Tensor, runs: int = 20) -> dict[str, float]:
        """Run every model in turn on inputs of these sizes; what each takes, in seconds."""
        for turn in range(-3, runs):
            for one in self.models:
                _, took = self._timed(one.name, inputs)
                if turn >= 0:
                    self._remember(one.name, inputs, took)
        return {one.name: self.seconds(one.name, *inputs) for one in self.models}

    def seconds(self, name: str, *inputs: torch.Tensor) -> float:
        """How long nine of ten calls of a model take for inputs of these sizes, as measured here."""
        known = self._times.get((name, _sizes(inputs)))
        if not known:
            raise UnsupportedError(
                f"how long {name} takes for inputs of {[list(t.shape) for t in inputs]} is not known yet: call warm_up "
                "with such inputs once"
            )
        return p90(known)

    def medians(self) -> dict[str, float]:
        """Median seconds of the latest calls of every model that has run, whatever their sizes."""
        found: dict[str, list[float]] = {}
        for (name, _), times in self._times.items():
            found.setdefault(name, []).extend(times)
        return {name: statistics.median(times) for name, times in found.items()}

    def _best(self, models: list[BundleModel]) -> BundleModel:
        if all(one.accuracy is not None for one in self.models):
            return max(models, key=lambda m: (m.accuracy or 0.0, -m.macs))
        return max(models, key=lambda m: m.macs)

    def _timed(self, name: str, inputs: tuple[torch.Tensor, ...]) -> tuple[tuple[torch.Tensor, ...], float]:
        return self._opened.run(next(one.file for one in self.models if one.name == name), inputs)

    def _remember(self, name: str, inputs: tuple[torch.Tensor, ...], took: float) -> None:
        self._times.setdefault((name, _sizes(inputs)), deque(maxlen=REMEMBERED)).append(took)

    def __str__(self) -> str:
        measured = self.medians()
        rows = [
            (
                one.name,
                number(one.macs),
                number(one.params),
                size(one.peak_bytes),
                "-" if one.accuracy is None else f"{one.accuracy:.2f} %",
                seconds(one.seconds),
                seconds(measured.get(one.name)),
            )
            for one in self.models
        ]
        return table(("model", "MACs", "parameters", "peak", "accuracy", "latency", "latency here"), rows)


def _sizes(inputs: tuple[torch.Tensor, ...]) -> Sizes:
    return tuple(tuple(t.shape) for t in inputs)
