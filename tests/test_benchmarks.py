"""The GPU benchmark runs as far as a machine without a GPU lets it."""

import json
import pathlib
import subprocess
import sys

SCRIPT = pathlib.Path(__file__).parents[1] / "benchmarks" / "ssd.py"


def run(*arguments):
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_it_says_that_it_needs_a_gpu():
    done = run("--check")
    assert done.returncode == 1
    assert "needs an NVIDIA GPU" in done.stdout


def test_a_dry_run_checks_and_writes_its_tables(tmp_path):
    done = run("--dry-run", "--output", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "A dry run" in (tmp_path / "ssd.md").read_text()
    rows = json.loads((tmp_path / "ssd.json").read_text())["rows"]
    assert {row["pass"] for row in rows} == {"forward", "forward + backward"}
    assert all(0 < row["error"] < 5e-2 and row["seconds"] > 0 and row["roofline"] > 0 for row in rows)
