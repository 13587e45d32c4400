"""The text of a plan file: mutated, spliced, absurd numbers, names and nesting."""

from __future__ import annotations

from pathlib import Path
from random import Random

import splitfx

SEEDS = (
    "format = 1\ninput_shape = [1, 3, 32, 32]\n\n[[pass]]\nname = 'tile'\nbudget = '2 MiB'\nuntil = 'layer4'\n",
    "format = 1\n[[pass]]\nname = 'group'\nfactors = [8, 2, 2]\nfusion = 'keep'\n\n[[pass]]\nname = 'drop_identity'\n",
    "format = 1\ninput_shape = [[1, 3, 8, 8], [1, 16]]\n[[pass]]\nname = 'subnetworks'\nbudgets = ['0.5x']\n",
    "format = 1\n[[pass]]\nname = 'splitnet'\n[pass.groups]\n'fc' = 2\n[[pass]]\nname = 'fold_batchnorm'\n",
    "format = 1\n[[pass]]\nname = 'tile'\ngrid = [2, 3]\nrows = 4\nevery = [1, 2]\nrecompute = -1\ncheckpoint = true\n",
)
WORDS = [
    *("-1", "0", "1e400", "nan", "inf", "true", "''", "[" * 50, "{a={a=1}}", "a.b.c", "0x_1", "= =", "...", "_", "# "),
    *("9" * 30, "9" * 5000, "x" * 5000, "1" * 400 + " MiB", "1979-05-27T07:32:00Z", "[1, 3, 1000000, 1000000]"),
    *("[[pass]]\n", "[pass]\n", "name = 'tile'\n", "format = 2\n", '"""', "'" * 7, "\\u0000"),
    *("\x1b[2J", "\ufeff", "\x00", "\ud800", "é" * 50, "\r"),
]
SAMPLE = 60


def draw(seed: int, folder: Path) -> str:
    random = Random(seed)
    text = random.choice(SEEDS)
    for _ in range(random.randint(1, 6)):
        at, end = sorted(random.randint(0, len(text)) for _ in range(2))
        how = random.randrange(5)
        if how == 0:
            text = text[:at] + random.choice(WORDS) * random.choice((1, 1, 1, 3, 200)) + text[at:]
        elif how == 1:
            text = text[:at] + text[min(end, at + 20) :]
        elif how == 2:
            text = text[:at] + random.choice(SEEDS)[at:]
        elif how == 3:
            text = text[:end] + text[at:]
        else:
            text = text[:at] + chr(random.randrange(0x110000)) + text[at + 1 :]
    (folder / "plan.toml").write_bytes(text.encode("utf-8", "surrogatepass" if random.random() < 0.5 else "replace"))
    plan = splitfx.Plan.load(folder / "plan.toml")
    assert splitfx.Plan.from_toml(plan.to_toml()) == plan
    plan.save(folder / "again.toml")
    assert splitfx.Plan.load(folder / "again.toml") == plan
    return "accepted"
