"""The grammar of names: what a name may be that reaches generated code or an attribute path.

fx writes the names of a graph into Python that it then compiles: inputs, keywords and nodes as they are, the parts of
a layer's path as attributes, or between quotes where they are no identifiers. So a name that comes from a file is held
to this grammar before anything is made of it; the writer holds its own names to it too.
"""

from __future__ import annotations

import keyword
import re
import unicodedata
from functools import cache
from typing import Any

from torch import fx, nn

LONGEST = 200  # characters of a name
DEEPEST = 40  # parts of a path
_PART = re.compile(r"[\w \-+:@#/]+")  # no quote, no backslash, no line end: fx puts it between quotes


def is_name(text: Any) -> bool:
    """Whether it can be a name in Python: an identifier as the compiler keeps it, no keyword, no ``__name__``."""
    return (
        isinstance(text, str)
        and len(text) <= LONGEST
        and text.isidentifier()
        and not keyword.iskeyword(text)
        and not text.startswith("__")
        and unicodedata.is_normalized("NFKC", text)  # the compiler would make another name of it
    )


def is_path(text: Any) -> bool:
    """Whether it can be the dotted path of a layer or a tensor: parts that no module has as methods or fields."""
    if not isinstance(text, str):
        return False
    parts = text.split(".")
    return len(parts) <= DEEPEST and parts[0] not in _own(fx.GraphModule) and all(map(_is_part, parts))


def _is_part(part: str) -> bool:
    fits = len(part) <= LONGEST and _PART.fullmatch(part) is not None and part.isprintable()
    return fits and part not in _own(nn.Module) and (is_name(part) or not part.isidentifier())


@cache
def _own(kind: type[nn.Module]) -> frozenset[str]:
    """The names that a module has by itself."""
    if kind is fx.GraphModule:
        return frozenset((*dir(kind(nn.Module(), fx.Graph())), "_in_spec", "_out_spec"))
    return frozenset(dir(kind()))
