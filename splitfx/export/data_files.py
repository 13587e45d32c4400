"""The file of weights beside an ONNX file: both change together or not at all.

The file is named after what is in it, ``model.onnx.0123456789abcdef.data``. New weights never go under the name that
the file there refers to; the rename of the ONNX file is the one step by which the model changes, and weights that no
file refers to any more go afterwards. A process that is killed leaves the old model or the new one, and at most weights
too many, which the next export with ``overwrite`` clears away.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from splitfx.errors import ExportError
from splitfx.ground.files import written_whole

LETTERS = 16  # of the digest


def data_name(model: Any, target: Path) -> str:
    """The name for the weights of an ONNX model in memory: other weights have another."""
    found = hashlib.sha256()
    for value in (v for graph in model.graphs() for v in graph.initializers.values()):
        tensor = value.const_value
        found.update(f"{value.name} {tensor.dtype} {tensor.shape}\n".encode())
        found.update(tensor.tobytes())
    return f"{target.name}.{found.hexdigest()[:LETTERS]}.data"


def data_files(target: Path) -> list[Path]:
    """The files of weights beside an ONNX file."""
    pattern = re.compile(re.escape(target.name) + rf"\.[0-9a-f]{{{LETTERS}}}\.data")
    return sorted(one for one in target.parent.iterdir() if pattern.fullmatch(one.name))


@contextmanager
def written_with_data(target: Path, name: str | None, *, overwrite: bool) -> Iterator[Path]:
    """As `written_whole`, for an ONNX file; its weights, if they are in a file ``name``, are written beside the draft.

    Raises `ExportError`; after an error both are as they were.
    """
    data = None if name is None else target.parent / name
    if data is not None and target.is_symlink():
        raise ExportError(f"{target} is a link, and its weights go into a file beside it: give the path it leads to.")
    fresh = data is not None and not data.exists()
    try:
        with written_whole(target, overwrite=overwrite, error=ExportError) as draft:
            yield draft
            if data is not None and (draft.parent / data.name).exists():
                os.replace(draft.parent / data.name, data)
    except Exception:
        if fresh and data is not None:
            data.unlink(missing_ok=True)
        raise
    for old in data_files(target) if overwrite else ():
        if old != data:
            old.unlink(missing_ok=True)
