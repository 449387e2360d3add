"""Run files of tests/sharded in a process with eight CPU devices."""

import pathlib
import subprocess
import sys

FOLDER = pathlib.Path(__file__).with_name("sharded")
OF_PROCESSES = FOLDER / "test_processes.py"


def run(files: list[pathlib.Path]) -> None:
    """Run the tests of all files in one process: importing everything takes seconds."""
    options = ("-q", "-p", "no:cacheprovider", "-m", "not slow")
    command = [sys.executable, "-m", "pytest", *options, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, cwd=FOLDER.parents[1])
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert " skipped" not in done.stdout
