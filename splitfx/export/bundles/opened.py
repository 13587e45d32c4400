"""What every runner of a folder of ONNX files holds: its manifest, and the sessions of its files on one provider."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from splitfx.export import sessions
from splitfx.ground.files.folders import FolderKind

M = TypeVar("M")


class Opened(Generic[M]):
    """``about``: the manifest. A file's session is opened when it is first asked for. ``threads``: of
    onnxruntime, None for torch's number. Raises `ExportError`."""

    def __init__(self, kind: FolderKind[M], folder: str | os.PathLike[str], provider: str, threads: int | None) -> None:
        self.folder = Path(folder)
        self.provider, self.threads = sessions.full_name(provider), threads or torch.get_num_threads()
        self.manifest = self.folder / kind.manifest
        self.about = kind.read_manifest(self.folder)
        self._sessions: dict[str, Any] = {}

    def session(self, file: str) -> Any:
        if file not in self._sessions:
            options = sessions.session_options(self.threads)
            self._sessions[file] = sessions.open_session(self.folder / file, self.provider, options)
        return self._sessions[file]

    def run(self, file: str, inputs: tuple[torch.Tensor, ...]) -> tuple[tuple[torch.Tensor, ...], float]:
        """The outputs of a file in its order, and the seconds of the run alone."""
        session = self.session(file)
        feed = sessions.feeds(session, inputs, {}, self.folder / file)
        started = time.perf_counter()
        found = sessions.ran(session, feed, self.folder / file)
        return tuple(map(torch.from_numpy, found)), time.perf_counter() - started
