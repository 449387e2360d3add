"""Run each file of tests/sharded in a process with eight CPU devices."""

import pathlib
import subprocess
import sys

import pytest

SHARDED = pathlib.Path(__file__).with_name("sharded")
FILES = sorted(path.name for path in SHARDED.glob("test_*.py"))


@pytest.mark.parametrize("file", FILES)
def test_on_eight_devices(file):
    # Not in parallel: eight devices keep a machine busy.
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "not slow",
        str(SHARDED / file),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=SHARDED.parents[1])
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert " skipped" not in done.stdout
