"""Run an untrusted Python program, with limits; a script, started by `sandbox` and never imported by others.

Reads a task as JSON from stdin, and writes its answer to stdout: the secret of the task, then "passed" or an
error. This guards against accidents and careless programs. It is no barrier for one that wants to break out.
"""

import contextlib
import ctypes
import io
import json
import os
import struct
import sys
from typing import Any

_PATH_EVENTS = {
    "open",
    "os.truncate",
    "os.mkdir",
    "os.rmdir",
    "os.remove",
    "os.rename",
    "os.link",
    "os.symlink",
}
_PATH_EVENTS |= {"os.chmod", "os.chown", "os.utime", "os.setxattr", "os.removexattr", "os.mkfifo", "os.mknod"}
_FORBIDDEN = ("socket.", "subprocess.", "ctypes.", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "pty.")
_FORBIDDEN += (
    "os.system",
    "os.kill",
    "signal.pthread_kill",
    "os.startfile",
    "sys.addaudithook",
    "os.chflags",
)
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

# Landlock, of Linux 5.13 and newer: numbers of the system calls, and rights by version of the interface.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_FILE_RIGHTS = {1: 0x1FF2, 2: 0x3FF2, 3: 0x7FF2}  # to write, truncate, remove, make, link and rename files
_EXECUTE, _TCP, _SIGNALS_AND_SOCKETS, _NO_NEW_PRIVILEGES = 1, 0b11, 0b11, 38


def main() -> None:
    """Run the program of the task."""
    task = json.load(sys.stdin)
    _limit(task["memory"], task["seconds"])
    _forbid_writes_by_the_kernel(task["folder"])
    sys.addaudithook(_auditor(task["folder"]))
    result = "passed"
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            exec(compile(task["program"], "program", "exec"), {"__name__": "__program__"})
    except BaseException as error:  # SystemExit too: a program that leaves has not passed
        result = f"{type(error).__name__}: {error}"[:500]
    os.write(1, f"{task['secret']}{result}".encode(errors="replace"))


def _limit(memory: int, seconds: int) -> None:
    """Limit memory, time, and sizes and number of files, where the platform can."""
    try:
        import resource
    except ImportError:  # Windows
        return
    limits = {"AS": memory, "DATA": memory, "CPU": seconds, "FSIZE": 1 << 24, "NOFILE": 64, "CORE": 0}
    for name, value in limits.items():
        with contextlib.suppress(AttributeError, ValueError, OSError):  # macOS refuses some
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


def _forbid_writes_by_the_kernel(folder: str) -> None:
    """Forbid this process all changes to files outside a folder, TCP and signals to others, if Linux can."""
    if not sys.platform.startswith("linux"):
        return
    library = ctypes.CDLL(None)
    system = library.syscall
    version = system(_CREATE_RULESET, None, 0, 1)
    if version < 1:
        return
    rights = _FILE_RIGHTS[min(version, 3)]
    forbidden = (rights | _EXECUTE, _TCP * (version >= 4), _SIGNALS_AND_SOCKETS * (version >= 6))
    size = 8 if version < 4 else 16 if version < 6 else 24  # bytes that this version knows
    rules = system(_CREATE_RULESET, struct.pack("=QQQ", *forbidden), ctypes.c_size_t(size), 0)
    place = os.open(folder, os.O_RDONLY)
    system(_ADD_RULE, rules, 1, struct.pack("=Qi", rights, place), 0)
    library.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)  # or Landlock refuses
    system(_RESTRICT_SELF, rules, 0)
    os.close(place)
    os.close(rules)


def _auditor(folder: str) -> Any:
    """Return an audit hook that forbids changes to files outside a folder, processes and sockets."""
    inside = os.path.realpath(folder) + os.sep

    def audit(event: str, args: tuple) -> None:
        if event.startswith(_FORBIDDEN):
            raise PermissionError(f"{event} is forbidden to a program")
        if event not in _PATH_EVENTS or (event == "open" and not args[2] & _WRITES):
            return
        paths = args[:2] if event in ("os.rename", "os.link", "os.symlink") else args[:1]
        for path in paths:
            if isinstance(path, int) or not (os.path.realpath(os.fsdecode(path)) + os.sep).startswith(inside):
                raise PermissionError(f"{event} of {path!r} is outside the folder of the program")

    return audit


if __name__ == "__main__":
    main()
