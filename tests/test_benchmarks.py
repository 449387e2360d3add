"""The benchmark of the scan, tiny: it runs, it writes what it measured, and it stops at a wrong result."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

BENCHMARK = pathlib.Path(__file__).parents[1] / "benchmarks" / "ssd.py"


def run(*arguments, code=None):
    """Run the script; `code` runs first, in the same process."""
    start = [BENCHMARK, *arguments]
    if code is not None:
        path, argv = str(BENCHMARK.parent), [str(BENCHMARK), *arguments]
        code = (
            f"import sys; sys.path.insert(0, {path!r}); sys.argv = {argv!r}\n{code}\nimport ssd; ssd.main()"
        )
        start = ["-c", code]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, *start], capture_output=True, text=True, timeout=300, env=environment
    )


def test_small_writes_a_table_and_json(tmp_path):
    done = run("--small", "--rounds", "2", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "ssd_cpu.json").read_text())
    assert {"device", "versions", "commit", "rounds", "method", "rows", "notes"} <= set(content)
    assert content["versions"]["jax"]
    assert len(content["rows"]) == 2 * 2 * 2  # shapes, passes, xla and the recurrence
    for row in content["rows"]:
        assert row["microseconds"] > 0
        assert row["gigabytes_per_second"] > 0
        assert row["share_of_roofline"] is None  # of a CPU
        assert (row["ratio_to_ours"] == 1) == (row["who"] == "xla")
    table = (tmp_path / "ssd_cpu.md").read_text()
    assert table.count("\n| ") == 1 + len(content["rows"])
    assert "needs an NVIDIA GPU" in table
    assert all(line in done.stdout for line in table.splitlines()[3:12] if line.startswith("| "))


def test_a_wrong_result_of_ours_ends_it():
    wrong = "import jax, contestants; ours = contestants.ops.ssd\n"
    wrong += "def ssd(*args, implementation, **kw):\n"
    wrong += "    y, state = ours(*args, implementation=implementation, **kw)\n"
    wrong += "    return (y * 1.25 if implementation == 'recurrent' else y), state\n"
    wrong += "contestants.ops.ssd = ssd"
    done = run("--small", "--rounds", "1", code=wrong)
    assert done.returncode == 1
    assert "small: recurrent: differs from float32 by y 2.5e-01" in done.stderr


def test_without_a_gpu_it_says_so():
    done = run("--shapes", "A")
    assert done.returncode == 1
    assert "no NVIDIA GPU here that jax" in done.stderr
    assert "--small" in done.stderr


@pytest.mark.parametrize(
    ("line", "arrays"),
    [
        ("f32[8,4]{1,0} all-reduce(f32[8,4] %x)", [("all-reduce", 128)]),
        ("f32[8,4]{1,0} all-reduce-start(f32[8,4] %x)", [("all-reduce", 128)]),
        ("(f32[8,4]{1,0}, bf16[2]{0}) all-reduce-start(%x, %y)", [("all-reduce", 128), ("all-reduce", 4)]),
        ("((f32[8,4]{1,0}, bf16[2]{0}), (f32[8,4]{1,0}, bf16[2]{0})) all-reduce-start(%x, %y)",
         [("all-reduce", 128), ("all-reduce", 4)]),
        ("(f32[8,4]{1,0}, f32[16,4]{1,0}) all-gather-start(f32[8,4] %x)", [("all-gather", 256)]),
        ("(bf16[8]{0}, bf16[8]{0}, u32[], u32[]) collective-permute-start(%x)", [("collective-permute", 16)]),
        ("f32[8,4]{1,0} all-reduce(f32[8,4] %x), replica_groups={{0},{1}}", []),  # of one device each
    ],
)  # fmt: skip
def test_collectives_are_counted_in_every_form_that_the_compiler_writes(line, arrays, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])  # the script adds to it
    spec = importlib.util.spec_from_file_location("memory", BENCHMARK.with_name("memory.py"))
    memory = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(memory)
    assert sorted(memory.collectives(f"  %a = {line}").elements()) == sorted(arrays)
