"""Run a command that may write below some folders only, as in a container with a read-only root.

python read_only_root.py FOLDER ... -- COMMAND ...

By Landlock (Linux 5.13 and newer, no privileges needed); reading is not limited. Numbers and
structures are those of linux/landlock.h.
"""

from __future__ import annotations

import ctypes
import os
import sys

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_GET_VERSION = 1
_PATH_BENEATH = 1
_NO_NEW_PRIVS = 38
_WRITE_FILE = 1 << 1
_CHANGE_FOLDER = sum(1 << bit for bit in range(4, 13))  # remove and make anything
_REFER, _TRUNCATE = 1 << 13, 1 << 14  # since versions 2 and 3


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


def version() -> int:
    """Return the version of the kernel's Landlock, 0 where there is none."""
    return max(_libc().syscall(_CREATE_RULESET, None, 0, _GET_VERSION), 0)


def restrict_writes(folders: list[str]) -> None:
    """Forbid this process and its children to write anywhere else; raises OSError."""
    access = _WRITE_FILE | _CHANGE_FOLDER
    access |= _REFER if version() >= 2 else 0
    access |= _TRUNCATE if version() >= 3 else 0
    handled = ctypes.c_uint64(access)
    ruleset = _checked(_CREATE_RULESET, ctypes.byref(handled), ctypes.sizeof(handled), 0)
    files = _WRITE_FILE | (access & _TRUNCATE)
    for path in (*folders, "/dev/null"):  # which every container has
        allowed = access if os.path.isdir(path) else files
        beneath = _PathBeneath(allowed, os.open(path, os.O_PATH | os.O_CLOEXEC))
        _checked(_ADD_RULE, ruleset, _PATH_BENEATH, ctypes.byref(beneath), 0)
        os.close(beneath.parent_fd)
    if _libc().prctl(_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
    _checked(_RESTRICT_SELF, ruleset, 0)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _checked(number: int, *arguments: object) -> int:
    result: int = _libc().syscall(number, *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"landlock call {number}")
    return result


if __name__ == "__main__":
    split = sys.argv.index("--")
    restrict_writes(sys.argv[1:split])
    os.execvp(sys.argv[split + 1], sys.argv[split + 1 :])
