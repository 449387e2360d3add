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


def test_whole_models_are_compared(tmp_path, monkeypatch, capsys):
    """On the CPU and tiny: `benchmarks/gpu.py` itself wants a GPU and a published size."""
    torch = pytest.importorskip("torch")
    monkeypatch.syspath_prepend(BENCHMARK.parent)
    import gpu

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_heads": 2, "head_dim": 32, "state_size": 16}
    tiny = Mamba2Config.preset("mamba2-130m").replace(**sizes)
    monkeypatch.setattr(Mamba2Config, "preset", lambda name: tiny)
    for name, value in {"DEVICE": "cpu", "ROUNDS": 1, "PROMPTS": ((2, 32),), "DECODED": ((2, 3),)}.items():
        monkeypatch.setattr(gpu, name, value)
    monkeypatch.setattr(gpu, "BATCHES", ((1, 32),))
    before = torch.get_default_dtype()
    gpu.write(tmp_path, "mamba2-130m")
    torch.set_default_dtype(before)
    found = {}
    for side, run_side in gpu.SIDES.items():
        capsys.readouterr()
        run_side(tmp_path, True)
        found[side] = json.loads(capsys.readouterr().out.splitlines()[-1])
    gpu.check(found)
    expected = ["prompt, 2 x 32 tokens", "decode, 2 rows, a token", "training step, 1 x 32 tokens"]
    assert [list(each["seconds"]) for each in found.values()] == [expected] * 2
    for name in expected:
        seconds = [each["seconds"][name] for each in found.values()]
        assert all(len(each) == 2 for each in seconds), seconds  # numbers, not words
        assert gpu.row("tiny", name, *seconds).count("|") == 7
    found["ours"]["logits"][0] += 10 * max(map(abs, found["transformers"]["logits"]))
    with pytest.raises(SystemExit, match="results differ"):
        gpu.check(found)


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
