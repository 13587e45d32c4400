"""The renames that the standard library has no word for: onto a free name only, and of two names for each other.

Both are one step of the operating system where it has them (Linux), so that a process killed at any moment leaves a
whole file or folder under the name. `exchange` says where it has not.
"""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

NOREPLACE, EXCHANGE = 1, 2
_AT_FDCWD = -100
_LACKING = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP)  # the system, or this file system, has it not


def put(draft: Path, target: Path) -> None:
    """Give ``draft`` the name ``target``. Raises `FileExistsError` where there is such a name, however late it came."""
    if _renameat2(draft, target, NOREPLACE):
        return
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    if draft.is_dir():  # a folder is renamed onto an empty one at most
        os.rename(draft, target)
        return
    try:
        os.link(draft, target)  # which fails where the name is taken
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        os.rename(draft, target)
        return
    os.unlink(draft)


def exchange(one: Path, other: Path) -> bool:
    """Let two files or folders change their names; False where the operating system cannot."""
    return _renameat2(one, other, EXCHANGE)


def _renameat2(old: Path, new: Path, how: int) -> bool:
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # another system, or a C library before it
        return False
    if call(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), how) == 0:
        return True
    number = ctypes.get_errno()
    if number in _LACKING:
        return False
    raise OSError(number, os.strerror(number), str(old), None, str(new))
