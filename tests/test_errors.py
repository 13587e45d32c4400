"""The error classes and the word that `nearest` suggests."""

from __future__ import annotations

import inspect

import pytest

from splitfx import errors
from splitfx.errors import MissingExtraError, PlanError, SplitfxError, nearest


def test_every_error_has_the_one_root_and_says_what_it_is_for():
    classes = [one for _, one in inspect.getmembers(errors, inspect.isclass) if one.__module__ == errors.__name__]
    assert len(classes) == 9
    assert all(issubclass(one, SplitfxError) and one.__doc__ for one in classes)


def test_errors_are_also_what_python_users_catch():
    assert issubclass(PlanError, ValueError)
    assert issubclass(MissingExtraError, ImportError)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("groop", " Did you mean 'group'?"),
        ("Group", " Did you mean 'group'?"),
        ("fold_batch_norm", " Did you mean 'fold_batchnorm'?"),
        ("quantize", ""),
        ("", ""),
    ],
)
def test_nearest(word: str, expected: str):
    assert nearest(word, ["group", "fold_batchnorm", "drop_identity"]) == expected


def test_nearest_of_nothing_is_nothing():
    assert nearest("group", []) == ""
