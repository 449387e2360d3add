"""Run the files of tests/sharded on eight devices; test_sharded_processes.py runs the slowest one beside."""

import sharded_process


def test_on_eight_devices():
    files = set(sharded_process.FOLDER.glob("test_*.py"))
    sharded_process.run(sorted(files - {sharded_process.OF_PROCESSES}))
