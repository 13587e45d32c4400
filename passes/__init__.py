"""The passes: one rewrite per file, found by the registry, imported here for users."""

from splitfx.passes.group import Group

__all__ = ["Group"]
