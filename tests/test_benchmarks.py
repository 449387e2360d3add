"""The benchmarks, tiny: they run, they write what they measured, and they stop at a wrong result."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from mamba2_jax import Mamba2Config

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


@pytest.mark.parametrize("part", ["reading", "training"])
def test_whole_models_are_compared(part, tmp_path, monkeypatch):
    """On the CPU and tiny: `benchmarks/gpu.py` itself wants a GPU and a published size."""
    torch = pytest.importorskip("torch")
    monkeypatch.syspath_prepend(BENCHMARK.parent)
    import gpu
    import gpu_sides

    for name in ("ROUNDS", "DEVICE", "PROMPTS", "DECODED", "BATCHES"):
        monkeypatch.setattr(gpu_sides, name, getattr(gpu_sides, name))
    monkeypatch.setattr(Mamba2Config, "preset", Mamba2Config.preset)
    gpu.make_small()
    before = torch.get_default_dtype()
    gpu_sides.write(tmp_path, "mamba2-130m")
    torch.set_default_dtype(before)
    ours, theirs = (side(tmp_path, "bfloat16") for side in gpu_sides.SIDES[part].values())
    expected = {
        "reading": {"prompt, 2 x 32 tokens": 64, "decode, 2 rows, a token": 2},
        "training": {"training step, 1 x 32 tokens": 32},
    }[part]
    assert list(ours["seconds"]) == list(theirs["seconds"]) == list(expected)
    assert gpu.apart(ours, theirs, 0.05) == ""
    for name, tokens in expected.items():
        times = ours["seconds"][name], theirs["seconds"][name]
        assert all(len(each) == 2 for each in times), times  # numbers, not words
        line = gpu.row("tiny", "bfloat16", name, *times, {"operations": 1e6, "peak": 1e12})
        assert line["tokens_per_second"] * times[0][0] == pytest.approx(tokens)
        assert line["mfu"] == pytest.approx(line["tokens_per_second"] / 1e6)
        assert gpu.markdown(line).count("|") == gpu.HEAD.count("|")
        assert gpu.row("tiny", "bfloat16", name, "out of memory", times[1], {})["ratio"] is None
    if part == "reading":
        ours["logits"][0] += 10 * max(map(abs, theirs["logits"]))
        assert "results differ" in gpu.apart(ours, theirs, 0.05)


def test_parts_on_a_gpu_go_on_after_a_failure_and_after_ten_minutes(tmp_path):
    """Run `.ci/gpu` with a Python that fails in the tests and takes too long for the scan."""
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\necho ran "$@"\ncase "$*" in "-m pytest"*) exit 3;; *ssd.py*) sleep 60;; esac\n'
    )
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python), "LIMIT": "3", "RESULTS": str(tmp_path)}
    command = [str(BENCHMARK.parents[1] / ".ci" / "gpu")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 1, done.stderr
    said = [line.removeprefix("==> make gpu: ") for line in done.stdout.splitlines()[-5:]]
    assert said[:2] == ["tests: FAILED with exit status 3", "scan: STOPPED after ten minutes"]
    assert [line.partition(" in ")[0] for line in said[2:]] == [
        f"{part}: passed" for part in ("models", "codestral", "training")
    ]
    assert done.stdout.count("ran benchmarks/gpu.py reading") == 2
    done = subprocess.run([*command, "nothing"], capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 2
    assert 'no part "nothing"; choose among' in done.stderr


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


def test_memory_of_the_data_is_measured_and_judged(tmp_path):
    command = [sys.executable, BENCHMARK.with_name("data.py"), "--megabytes", "1", "2"]
    done = subprocess.run(
        [*command, "--output", tmp_path / "data.md"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    rows = [line for line in (tmp_path / "data.md").read_text().splitlines() if " MB | " in line]
    assert [row.split(" | ")[:2] for row in rows] == [
        [f"| {size} MB", what] for size in (1, 2) for what in ("tokenising", "reading")
    ]
    spec = importlib.util.spec_from_file_location("data", BENCHMARK.with_name("data.py"))
    assert spec is not None
    assert spec.loader is not None
    data = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(data)
    small, large = (
        {what: {"before": 0, "tenth": 0, "end": 0, "peak": peak} for what in ("tokenising", "reading")}
        for peak in (1, 99)
    )
    with pytest.raises(SystemExit, match="tokenising: the larger text needs 98 MB more"):
        data.verdict(small, large)
