"""Run the files of tests/sharded in a process with eight CPU devices."""

import pathlib
import subprocess
import sys

SHARDED = pathlib.Path(__file__).with_name("sharded")


def test_on_eight_devices():
    files = sorted(map(str, SHARDED.glob("test_*.py")))
    # In one process: eight devices keep a machine busy, and to import everything takes seconds.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, cwd=SHARDED.parents[1])
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert " skipped" not in done.stdout
