"""SplitNet on the page of a saved split: its classes by group, as names and as a matrix, and the blocks of its layers.

A carved model no longer has the weights between its groups, nor the user's order of channels: the page says so and
draws what is there. Nothing comes from outside the page: small pictures stand in it as data.
"""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Iterator
from html import escape

import numpy as np
from torch import fx

from splitfx.ground.table import shorten
from splitfx.ir.graph import info
from splitfx.report.plots.splitnet_classes import UNNAMED, Classes, carved_classes
from splitfx.report.plots.splitnet_matrices import carved_blocks, diagonal, reduced

BAND, CELL, NAME = 50, 20, 24  # classes beside each other, pixels of a class, letters of its name
LAYERS, PIXELS, SIDE = 8, 96, 200  # layers drawn, rows and columns of each in the data and on the page


def splitnet_html(graph: fx.GraphModule) -> Iterator[str]:
    """The section of a model that SplitNet carved; nothing for others."""
    if not any(step.name == "splitnet" and step.changed for step in info(graph).steps):
        return
    classes = carved_classes(graph)
    yield "<h2>Groups of classes</h2>"
    if classes is None:
        yield '<p class="soft">The classes are not in groups: the split ends before the classifier.</p>'
    else:
        yield from _table(classes)
        yield f'<div class="wide">{"".join(_band(classes, band) for band in _bands(classes))}</div>'
    yield from _weights(graph)


def _table(classes: Classes) -> Iterator[str]:
    told = f"{len(classes.names)} classes in {classes.level} groups" + ("" if classes.named else UNNAMED)
    yield f'<p class="soft">{escape(told)}.</p>'
    rows = "".join(
        f"<tr><td>group {g + 1}, {len(own)} class{'es' * (len(own) != 1)}</td><td>{escape(', '.join(own))}</td></tr>"
        for g in range(classes.level)
        for own in [classes.members(g)]
    )
    yield f'<table class="notes"><tbody>{rows}</tbody></table>'


def _bands(classes: Classes) -> list[list[int]]:
    order = np.argsort(classes.groups, kind="stable")
    return [run.tolist() for run in np.array_split(order, -(-len(order) // BAND))]


def _band(classes: Classes, band: list[int]) -> str:
    """A group × class matrix with the classes' names upright below."""
    groups = sorted({int(classes.groups[c]) for c in band})
    names = [shorten(classes.names[c], NAME) for c in band]
    left, high = 70, CELL * len(groups)
    width, height = left + CELL * len(band) + 2, high + 12 + 7 * max(map(len, names))
    drawn = [
        f'<text class="end" x="{left - 8}" y="{CELL * (r + 0.7):g}">group {g + 1}</text>' for r, g in enumerate(groups)
    ]
    for column, (one, name) in enumerate(zip(band, names, strict=True)):
        x, row = left + CELL * column, groups.index(int(classes.groups[one]))
        drawn += [
            f'<rect class="{"in" if r == row else "out"}" x="{x}" y="{CELL * r}" width="{CELL}" height="{CELL}"/>'
            for r in range(len(groups))
        ]
        middle, below = x + CELL / 2 + 4, high + 6
        drawn.append(
            f'<text class="end name" transform="translate({middle:g} {below}) rotate(-90)">{escape(name)}'
            f"<title>{escape(classes.names[one])}, group {groups[row] + 1}</title></text>"
        )
    return f'<svg class="classes" width="{width}" height="{height}" role="img">{"".join(drawn)}</svg>'


def _weights(graph: fx.GraphModule) -> Iterator[str]:
    found = carved_blocks(graph)
    if not found:
        return
    shown = list(found.items())[-LAYERS:]
    which = f"the last {len(shown)} of {len(found)} split layers" if len(shown) < len(found) else "the split layers"
    yield "<h3>weights by group</h3>"
    yield (
        f'<p class="soft">The blocks that {which} have, channels by group: root mean square over the kernel, the '
        "stronger the colour the larger. The weights between groups and the order of channels before the split are no "
        "longer in this model; splitfx.splitnet.plot_weights draws both from the dense one.</p>"
    )
    yield f'<div class="wide blocks">{"".join(_figure(where, blocks) for where, blocks in shown)}</div>'


def _figure(where: str, blocks: list[np.ndarray]) -> str:
    whole, places = diagonal(blocks)
    rows, columns = whole.shape
    small = reduced(whole, PIXELS)
    peak = float(np.quantile(small[small > 0], 0.99)) if (small > 0).any() else 1.0
    data = base64.b64encode(_png(np.clip(255 * small / peak, 0, 255).round().astype(np.uint8))).decode()
    borders = "".join(
        f'<rect class="border" x="{SIDE * left / columns:.2f}" y="{SIDE * top / rows:.2f}" '
        f'width="{SIDE * (right - left) / columns:.2f}" height="{SIDE * (bottom - top) / rows:.2f}"/>'
        for top, bottom, left, right in places
    )
    told = f"{len(blocks)} blocks, {rows} × {columns} in all"
    return (
        f'<figure><svg class="block" viewBox="-1 -1 {SIDE + 2} {SIDE + 2}" role="img">'
        f'<image width="{SIDE}" height="{SIDE}" preserveAspectRatio="none" href="data:image/png;base64,{data}"/>'
        f"{borders}</svg>"
        f"<figcaption>{escape(where)}<br><small>{told}</small></figcaption></figure>"
    )


def _png(values: np.ndarray) -> bytes:
    """A picture in one blue whose opacity [rows, columns] is 0 to 255, so that it suits light and dark pages."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows, columns = values.shape
    lines = b"".join(b"\0" + line.tobytes() for line in np.ascontiguousarray(values))
    palette, opacity = bytes((0x4A, 0x8F, 0xD6)) * 256, bytes(range(256))
    head = struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)
    parts = (
        (b"IHDR", head),
        (b"PLTE", palette),
        (b"tRNS", opacity),
        (b"IDAT", zlib.compress(lines, 9)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in parts)
