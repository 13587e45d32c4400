"""A pass as text: the graph before it, written by hand, and the graph after it."""

from __future__ import annotations

import torch

from splitfx.compiler.pipeline import run_pass
from splitfx.compiler.protocol import Pass
from splitfx.ir.graph import info
from splitfx.ir.ops import parse, text


def rewritten(before: str, step: Pass) -> str:
    """The text after a pass, and its notes; the pipeline holds the pass to its promise in float64."""
    torch.manual_seed(0)
    after, _ = run_pass(parse(before), step)
    return text(after) + "".join(f"# {note.where}: {note.what}\n" for note in info(after).steps[-1].notes)
