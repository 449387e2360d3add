"""Run untrusted Python programs in processes of their own, with limits of time, memory and files."""

import contextlib
import json
import math
import os
import pathlib
import secrets
import signal
import subprocess
import sys
import tempfile

MEMORY = 1 << 30
"""Bytes of memory that a program may use."""


def run_program(program: str, *, timeout: float = 3.0, memory: int = MEMORY) -> str:
    """Run a program in a new process and an empty folder, and return "passed", "timed out" or its error.

    The process has no environment, no installed packages and no output. It may write files into its folder
    only, which is deleted, and start no process and open no socket; on Linux 5.13 and newer the kernel
    enforces that for files. This guards against accidents. Run all of it in a container for hostile programs.

    Args:
        program: source code.
        timeout: seconds, after which the process is killed.
        memory: bytes of memory that the program may use; not limited on Windows.

    >>> run_program("assert 1 + 1 == 2"), run_program("assert 1 + 1 == 3")
    ('passed', 'AssertionError: ')
    """
    guard = pathlib.Path(__file__).with_name("guard.py")
    command = [sys.executable, "-I", "-S", "-B", str(guard)]
    secret = secrets.token_hex(16)  # a program that ends its process early cannot say that it passed
    with (
        tempfile.TemporaryDirectory(prefix="mamba2-jax-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as answer,
    ):
        task = {"program": program, "folder": folder, "secret": secret, "memory": memory}
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=answer,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=None if os.name == "nt" else {},
            start_new_session=True,
        )
        try:
            process.communicate(json.dumps(task | {"seconds": math.ceil(timeout) + 1}).encode(), timeout)
        except subprocess.TimeoutExpired:
            return "timed out"
        finally:
            with contextlib.suppress(AttributeError, OSError):  # what it may have started, too
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.wait()
        answer.seek(0)
        text = answer.read(4096).decode(errors="replace")
    if text.startswith(secret):
        return text.removeprefix(secret)
    return f"the process ended with code {process.returncode}"
