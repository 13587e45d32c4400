"""The step-down convolution: kernel, stride and padding that take an image to the size of a cut, per axis.

Closed form: every window operation maps a size n to ⌊(n + c)/s⌋ with c = padding at both ends − d(k−1) − 1 + s. Nested
floors collapse, so a chain of them is one `Map`, n → ⌊(n + A)/S⌋, and one convolution with

    stride = S,   padding = max(0, ⌈A/2⌉),   kernel = S + 2·padding − A

has the same map: it fits at every size of the image. `static` fits one size only, for trunks without such a map.
Refused (`UnsupportedError`): a cut that is larger than the image.
"""

from __future__ import annotations

from dataclasses import dataclass

from splitfx.errors import UnsupportedError


@dataclass(frozen=True)
class Axis:
    """One axis of a convolution without dilation."""

    kernel: int
    stride: int
    padding: int

    def size(self, n: int) -> int:
        """How many values come of ``n``."""
        return (n + 2 * self.padding - self.kernel) // self.stride + 1


@dataclass(frozen=True)
class Map:
    """n → ⌊(n + add) / scale⌋, what a chain of window operations does to a size."""

    add: int = 0
    scale: int = 1

    def __call__(self, n: int) -> int:
        return (n + self.add) // self.scale

    def then(self, kernel: int, stride: int, padding: int, dilation: int = 1, ceil_mode: bool = False) -> Map:
        """This map and a window behind it; ``padding`` is that of both ends together. A pool in ceil mode drops a last
        window that starts in the padding, which no such map says: compare with the real size."""
        c = padding - dilation * (kernel - 1) - 1 + stride + (stride - 1 if ceil_mode else 0)
        return Map(self.add + c * self.scale, self.scale * stride)

    def axis(self) -> Axis:
        """The convolution with this map; its kernel is never below its stride, so it sees every pixel."""
        padding = max(0, -(-self.add // 2))
        return Axis(self.scale + 2 * padding - self.add, self.scale, padding)


def static(n: int, m: int) -> Axis:
    """The least kernel that takes ``n`` to ``m`` and sees every pixel, for this one size."""
    if not 1 <= m <= n:
        raise UnsupportedError(f"a step-down convolution cannot take {n} rows or columns to {m}")
    found = []
    for stride in sorted({n // m, -(-n // m)}):
        for padding in range(stride + 1):
            kernel = n + 2 * padding - (m - 1) * stride
            if kernel >= stride and 2 * padding <= kernel:
                found.append((kernel, padding, stride))
    kernel, padding, stride = min(found)  # ⌊n/m⌋ without padding is always among them
    return Axis(kernel, stride, padding)
