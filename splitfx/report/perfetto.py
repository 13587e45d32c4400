"""A profile as a trace that ui.perfetto.dev and chrome://tracing open: operations in order, and the memory alive."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from splitfx.ground.files import written_whole
from splitfx.ground.table import dims

if TYPE_CHECKING:
    from splitfx.report.profile import Profile

STEP = 1000  # microseconds that one operation takes in the picture: it is an order, not a time


def write_trace(profile: Profile, path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Write the trace as JSON. Raises `SplitfxError` where the file exists or cannot be written."""
    text = json.dumps({"traceEvents": list(_events(profile)), "displayTimeUnit": "ms"})
    with written_whole(path, overwrite=overwrite) as draft:
        draft.write_text(text, encoding="utf-8")


def _events(profile: Profile) -> Iterator[dict[str, Any]]:
    place = {"pid": 1, "tid": 1}
    yield {"ph": "M", "name": "process_name", "args": {"name": f"splitfx: {profile.model}"}, **place}
    yield {"ph": "M", "name": "thread_name", "args": {"name": "operations in order"}, **place}
    for number, row in enumerate(profile.rows):
        at = number * STEP
        told = {"operation": row.op, "output": dims(row.shape), "parameters": row.params, "MACs": row.macs}
        yield {"ph": "X", "name": row.layer, "cat": row.op, "ts": at, "dur": STEP, "args": told, **place}
        yield {"ph": "C", "name": "bytes alive", "ts": at, "args": {"bytes": row.live_bytes}, **place}
    yield {"ph": "C", "name": "bytes alive", "ts": len(profile.rows) * STEP, "args": {"bytes": 0}, **place}
