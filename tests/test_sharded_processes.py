"""Run the tests of several processes, which wait for each other, beside those of test_sharded.py."""

import sharded_process


def test_on_eight_devices_of_two_processes():
    sharded_process.run([sharded_process.OF_PROCESSES])
