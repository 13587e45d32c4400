"""Freed memory that stays with the process: pages that the kernel has to clear, counted."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys

import pytest

from splitfx.parallel import keep_pages

COUNT = """
import json, resource, sys
import torch
from splitfx.parallel import keep_pages

faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
if sys.argv[1] == "kept":
    assert keep_pages()

def made():
    for size in (1 << 24, 1 << 23):
        torch.ones(size).sum()

made(), made()
before = faults()
for _ in range(20):
    made()
print(json.dumps(faults() - before))
"""


def counted(how: str) -> int:
    """Fresh pages for twenty times 96 MiB of tensors."""
    done = subprocess.run([sys.executable, "-c", COUNT, how], capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout))


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_a_large_tensor_takes_no_fresh_pages() -> None:
    assert counted("kept") < 1000
    assert counted("as it comes") > 10_000  # else the first line shows nothing


def test_another_c_library_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not keep_pages()
