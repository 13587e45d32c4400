"""Trials on disk: an Optuna study that says what was found, a folder per trial for weights, a lock for who works on it.

A lock is the operating system's, so a worker that is killed gives its trial back at once. Whether a trial is done is
said by the study alone, written after its weights. Weights are in the folder even where the study is in a database.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import fx

from splitfx import storage
from splitfx.errors import MissingExtraError, TrainingError
from splitfx.text import first_line

SPLIT, RUN = "split", "run"
JOURNAL = "study.journal"
ABOUT, KEY = "splitfx", "key"


@dataclass(frozen=True)
class Found:
    """A finished trial."""

    key: str
    values: tuple[float, ...]  # accuracy in percent; for a front also MACs and peak bytes
    seconds: float

    @property
    def accuracy(self) -> float:
        return self.values[0]


class Trials:
    """The trials of one search in ``folder``, seen alike by all its workers.

    ``about`` is what the search depends on; a study that was made for something else is refused. ``choices``: the
    factors that each block may have. ``url``: a database of Optuna's instead of the journal file. Raises
    `TrainingError`, `MissingExtraError`.
    """

    def __init__(
        self,
        folder: Path,
        about: Mapping[str, Any],
        choices: Sequence[tuple[int, ...]],
        directions: tuple[str, ...] = ("maximize",),
        url: str = "",
        seed: int = 0,
    ) -> None:
        self.folder, self.choices = folder, choices
        self.study_is_in = re.sub("//[^/]*@", "//", url) or str(folder / JOURNAL)  # without a password
        optuna = _optuna()
        with self.locked("study"):  # two workers that start at once would each make it
            try:
                storage_of: Any = url or optuna.storages.JournalStorage(
                    optuna.storages.journal.JournalFileBackend(str(folder / JOURNAL), _Writer(folder))
                )
                self.study = optuna.create_study(
                    storage=storage_of,
                    study_name="splitfx",
                    directions=list(directions),
                    load_if_exists=True,
                    sampler=optuna.samplers.TPESampler(seed=seed),
                )
                known = self.study.user_attrs.get(ABOUT)
                if known is None:
                    self.study.set_user_attr(ABOUT, dict(about))
            except Exception as error:  # optuna's storages raise what their backends do
                raise TrainingError(f"the study in {self.study_is_in} cannot be opened: {first_line(error)}") from error
        if known is not None:
            _same(known, json.loads(json.dumps(dict(about))), self.study_is_in)

    # ------------------------------------------------------------ what is known

    def all(self) -> dict[str, Found]:
        """Finished trials by key; of several of one key the first."""
        from optuna.trial import TrialState

        found: dict[str, Found] = {}
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            key = trial.user_attrs.get(KEY)
            if key is not None and key not in found:
                found[key] = Found(key, tuple(trial.values), trial.user_attrs["seconds"])
        return found

    def place(self, key: str) -> Path:
        return self.folder / "trials" / key

    def split(self, key: str) -> fx.GraphModule:
        """The trained split of a finished trial. Raises `TrainingError` where another folder holds it."""
        place = self.place(key) / SPLIT
        if not place.is_dir():
            raise TrainingError(
                f"{place} is missing, though the study in {self.study_is_in} has that trial: give the folder that the "
                "search was begun with; all its workers need the same one"
            )
        return storage.load(place)

    def distributions(self) -> dict[str, Any]:
        from optuna.distributions import CategoricalDistribution

        return {block_name(i): CategoricalDistribution(one) for i, one in enumerate(self.choices)}

    # ------------------------------------------------------------ one trial

    @contextmanager
    def claimed(self, key: str) -> Iterator[bool]:
        """Whether this worker may work on a trial now: nobody else does, and it is not done."""
        with self.locked(key, wait=False) as mine:
            yield mine and key not in self.all()

    def finish(
        self, key: str, factors: Sequence[int], split: fx.GraphModule, values: list[float], seconds: float
    ) -> None:
        """Save a trial's split, then say in the study that it is done; ``values[0]`` is the accuracy."""
        from optuna.trial import TrialState, create_trial

        place = self.place(key)
        place.mkdir(parents=True, exist_ok=True)
        storage.save(split, place / SPLIT, overwrite=True)
        done = create_trial(
            state=TrialState.COMPLETE,
            values=values,
            params={block_name(i): factor for i, factor in enumerate(factors)},
            distributions=self.distributions(),
            user_attrs={KEY: key, "seconds": seconds},
        )
        try:
            self.study.add_trial(done)
        except Exception as error:  # optuna's storages raise what their backends do
            raise TrainingError(
                f"the study in {self.study_is_in} cannot be written: {first_line(error)}. Trial {key} is not in it; go "
                "on with resume=True (--resume) when it can be"
            ) from error
        shutil.rmtree(place / RUN, ignore_errors=True)  # its checkpoints

    @contextmanager
    def locked(self, name: str, wait: bool = True) -> Iterator[bool]:
        from filelock import FileLock, Timeout

        home = self.folder / "locks"
        home.mkdir(parents=True, exist_ok=True)
        lock = FileLock(str(home / name.replace("/", "_")), timeout=-1 if wait else 0)
        try:
            lock.acquire()
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            with contextlib.suppress(OSError):
                lock.release()


class _Writer:
    """Who may write the journal, as optuna asks for it: a lock that a killed writer cannot leave behind.

    What a writer was cut off in, by a full disk, is no line; the next one would be written onto it.
    """

    def __init__(self, folder: Path) -> None:
        from filelock import FileLock

        self.journal = folder / JOURNAL
        self.lock = FileLock(str(folder / "locks" / "journal"))

    def acquire(self) -> bool:
        self.lock.acquire()
        with self.journal.open("r+b") as file:
            text = file.read()
            if not text.endswith(b"\n"):
                file.truncate(text.rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        self.lock.release()


def block_name(index: int) -> str:
    return f"block{index + 1}"


def _same(known: Mapping[str, Any], mine: Mapping[str, Any], where: str) -> None:
    for name in mine:
        if known.get(name) == mine[name]:
            continue
        there, here = known.get(name), mine[name]
        if isinstance(here, dict) and isinstance(there, dict):
            key = min(k for k in {*here, *there} if here.get(k) != there.get(k))
            name, there, here = f"{name}: {key}", there.get(key), here.get(key)
        raise TrainingError(
            f"the study in {where} was made for something else: {name} is {there} there, {here} here; choose another "
            f"{'database' if '://' in where else 'folder'}"
        )


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise MissingExtraError(f"optuna cannot be imported ({error}): pip install 'splitfx[search]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
