"""Where the trials of a search are kept, so that it can go on and several workers can share it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from splitfx.errors import PlanError
from splitfx.train import checkpoint
from splitfx.train.processes import launched


@dataclass(frozen=True)
class SearchStudy:
    """A folder for the trials of a search; without one they are gone when the result is.

    ``resume``: the folder may hold trials of this very search, which goes on with them. Several workers are the same
    call in several processes, with ``resume``, and share the work. ``database``: the URL of a database of Optuna's for
    what is otherwise ``study.journal``; the weights are in the folder even so.

    Raises `PlanError` for a study that goes on, or is in a database, without a folder.
    """

    folder: str | Path | None = None
    resume: bool = False
    database: str = ""

    def __post_init__(self) -> None:
        if self.folder is None and (self.resume or self.database):
            raise PlanError(
                "a search that goes on, or whose study is in a database, needs a folder: it holds the weights"
            )

    @contextmanager
    def opened(self) -> Iterator[Path]:
        """The folder, for this worker. Raises `PlanError` under torchrun, `TrainingError` for one that is not empty."""
        if launched()[1] > 1:
            raise PlanError(
                "a search is not run by torchrun: start it several times on one folder with resume=True (--resume), "
                "each with a GPU of its own (CUDA_VISIBLE_DEVICES), and they share the trials"
            )
        if self.folder is None:
            with tempfile.TemporaryDirectory(prefix="splitfx-") as place:
                yield Path(place)
            return
        checkpoint.open_folder(Path(self.folder), self.resume, "search")
        yield Path(self.folder)


TEMPORARY = SearchStudy()
