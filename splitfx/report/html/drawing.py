"""A scene as an SVG file of its own, without script: boxes row by row, the open ones around what they hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape

from splitfx.ground.table import shorten
from splitfx.report.html.scene import Item, levels
from splitfx.report.html.style import COLOURS, GRAPH

WIDE, NARROW, HIGH, MORE, GAP, ROW, PAD, HEAD = 184, 112, 42, 14, 14, 26, 12, 42


@dataclass(eq=False)
class _Card:
    item: Item
    inner: list[_Card] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    edges: list[list[int]] = field(default_factory=list)
    fed: list[int] = field(default_factory=list)
    x: float = 0.0
    y: float = 0.0
    width: float = WIDE
    height: float = HIGH


def scene_svg(root: Item) -> str:
    """The file: the root's boxes, those that are ``open`` with what they hold."""
    root.open = True
    card = _measured(root)
    drawn = [*_edges(card, 0, 0), *(line for one in card.inner for line in _drawn(one, 0, 0))]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="the graph" viewBox="0 0 {card.width:.0f} '
        f'{card.height + 8:.0f}" width="{card.width:.0f}" height="{card.height + 8:.0f}">'
        f"<style>{COLOURS}{GRAPH}</style>{''.join(drawn)}</svg>\n"
    )


def _measured(item: Item) -> _Card:
    card = _Card(item, height=HIGH + MORE * bool(item.strip))
    if not (item.items and item.open):
        return card
    card.rows, card.edges, card.fed, _ = levels(item)
    card.inner = [_measured(one) for one in item.items]
    for one, row in zip(card.inner, card.rows, strict=True):
        if not one.inner:
            one.width = max(NARROW, min(WIDE, 640 / card.rows.count(row)))
    y, width, middle = float(HEAD if item.name else 4), 0.0, dict[int, float]()
    for row in range(max(card.rows) + 1):
        line = [place for place, one in enumerate(card.rows) if one == row]
        line.sort(key=lambda place: (_wanted(card, place, middle), card.inner[place].item.branch or 0))
        total = sum(card.inner[p].width for p in line) + GAP * (len(line) - 1)
        x = -total / 2
        for place in line:
            one = card.inner[place]
            one.x, one.y, middle[place] = x, y, x + one.width / 2
            x += one.width + GAP
        y += max(card.inner[p].height for p in line) + ROW
        width = max(width, total)
    lanes = min(6, sum(card.rows[b] - card.rows[a] > 1 for a, b in card.edges) + len(_below(card)))
    card.width, card.height = max(width + 2 * PAD + 18 * lanes, WIDE), y - ROW + PAD
    for one in card.inner:
        one.x += card.width / 2
    return card


def _wanted(card: _Card, place: int, middle: dict[int, float]) -> float:
    """Below what it reads."""
    near = [middle[a] for a, b in card.edges if b == place and a in middle]
    return round(sum(near) / len(near), 1) if near else 0.0


def _below(card: _Card) -> list[int]:
    """What reads from outside the box, though not in its first row."""
    return [place for place in card.fed if card.rows[place] > 0] if card.item.name else []


def _edges(card: _Card, x: float, y: float) -> list[str]:
    lines: list[str] = []
    used: dict[float, int] = {}

    def around(x1: float, y1: float, x2: float, y2: float, above: int, below: int, turn: int) -> str:
        between = [one for one, row in zip(card.inner, card.rows, strict=True) if above < row < below]
        far = max(one.x + one.width for one in between)
        used[far] = used.get(far, 0) + 1
        at, off = x + far + 9 * min(used[far], 6), min(20.0, (y2 - y1) / 2)
        return (
            f'<path class="edge skip" d="M{x1:.0f} {y1:.0f}C{x1:.0f} {y1 + turn:.0f} {at:.0f} {y1:.0f} {at:.0f} '
            f'{y1 + turn:.0f}L{at:.0f} {y2 - off:.0f}C{at:.0f} {y2:.0f} {x2:.0f} {y2 - off:.0f} {x2:.0f} {y2:.0f}"/>'
        )

    for a, b in card.edges:
        first, last = card.inner[a], card.inner[b]
        x1, y1 = x + first.x + first.width / 2, y + first.y + first.height
        x2, y2 = x + last.x + last.width / 2, y + last.y
        if card.rows[b] - card.rows[a] <= 1:
            half = (y1 + y2) / 2
            lines.append(
                f'<path class="edge" d="M{x1:.0f} {y1:.0f}C{x1:.0f} {half:.0f} {x2:.0f} {half:.0f} {x2:.0f} {y2:.0f}"/>'
            )
            continue
        lines.append(around(x1, y1, x2, y2, card.rows[a], card.rows[b], 20))
    for place in _below(card):
        one = card.inner[place]
        ends = x + card.width / 2, y + 32, x + one.x + one.width / 2, y + one.y
        lines.append(around(*ends, -1, card.rows[place], 9))
    for place in card.fed if card.item.name else ():
        if card.rows[place] == 0:
            at = x + card.inner[place].x + card.inner[place].width / 2
            lines.append(f'<path class="edge" d="M{at:.0f} {y + 32:.0f}L{at:.0f} {y + card.inner[place].y:.0f}"/>')
    return lines


def _drawn(card: _Card, left: float, top: float) -> list[str]:
    item, x, y = card.item, left + card.x, top + card.y
    lane = " branch" * (bool(item.items) and item.branch is not None)
    kind = f"box {item.kind}{lane}{' open' * bool(card.inner)}{' new' * item.changed}"
    face = f'x="{x:.1f}" y="{y:.1f}" width="{card.width:.1f}" height="{card.height:.1f}" rx="6"'
    name = item.name + ("" if item.branch is None else f" · {item.branch + 1}")
    lines = [f'<g class="{kind}"><title>{escape(f"{item.path}: {item.label}")}</title><rect class="face" {face}/>']
    if card.inner:
        letters = int(card.width / 6)
        lines.append(
            f'<text class="name left" x="{x + 9:.1f}" y="{y + 15:.1f}">{escape(shorten(name, letters))}</text>'
        )
        told = escape(shorten(item.label, letters, middle=False))
        lines.append(f'<text class="left" x="{x + 9:.1f}" y="{y + 28:.1f}">{told}</text></g>')
        lines += _edges(card, x, y)
        return lines + [line for one in card.inner for line in _drawn(one, x, y)]
    middle = x + card.width / 2
    label = item.label if item.cells == 1 else f"{shorten(item.label, 19, middle=False)}, {item.cells} groups"
    lines += [
        f'<text class="name" x="{middle:.1f}" y="{y + 17:.1f}">{escape(_fitted(name, int(card.width / 7.4)))}</text>',
        f'<text x="{middle:.1f}" y="{y + 32:.1f}">{escape(shorten(label, int(card.width / 6.4), middle=False))}</text>',
    ]
    if item.strip:
        lines.append(f'<text x="{middle:.1f}" y="{y + 46:.1f}">{escape(item.strip)}</text>')
    for cell in range(1, item.cells if item.cells <= 32 else 1):
        at = x + card.width * cell / item.cells
        lines.append(f'<path class="cell" d="M{at:.1f} {y:.1f}v6M{at:.1f} {y + card.height - 6:.1f}v6"/>')
    return [*lines, "</g>"]


def _fitted(name: str, letters: int) -> str:
    """The last part of a path says most."""
    return shorten(name if len(name) <= letters else name.rpartition(".")[2], letters)
