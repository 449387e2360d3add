"""Two processes of four devices that train as one, started as the README says, stopped and killed."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from flax import nnx
from meshes import small_config
from training_runs import texts_file, tokenizer

from mamba2_jax import Mamba2ForCausalLM
from mamba2_jax.cli.finetune import finetune
from mamba2_jax.lora import load_lora
from mamba2_jax.processes import start_processes
from mamba2_jax.training.metrics import METRICS_FILE, read_metrics

TOLERANCE = 1e-5  # float32 sums in another order
COUNT, STEPS = 2, 8
ROOT = pathlib.Path(__file__).parents[2]
PATIENCE = 300  # seconds that processes may take on a busy machine
IMPORT = ROOT / "tests" / "sharded" / "import_in_processes.py"
FINETUNE = ("-m", "mamba2_jax.cli", "finetune")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    end = tokenizer().eos_token_id
    ids = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    config = small_config(2, vocab_size=32, num_hidden_layers=1, **ids)  # one compiles sooner
    folder = tmp_path_factory.mktemp("model") / "model"
    Mamba2ForCausalLM(config, rngs=nnx.Rngs(0)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def options(model, output, **more) -> list[str]:
    """Arguments of `mamba2-jax finetune`."""
    settings = {
        "model": model, "data": texts_file(), "output": output, "steps": STEPS, "batch-size": 8,
        "data.max-length": 48, "optim.learning-rate": 0.01, "checkpoint.every": 4, "checkpoint.keep": 9,
        **more,
    }  # fmt: skip
    arguments = []
    for name, value in settings.items():
        arguments += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return [*arguments, "--no-progress", "--no-tensorboard"]


def start(arguments: list[str], tmp_path, program=FINETUNE, slurm: bool = False) -> list[subprocess.Popen]:
    """Start both processes, told of each other by arguments or as SLURM does; what they say goes to files."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count=4 {os.environ.get('XLA_FLAGS', '')}"  # conftest.py's too
    devices = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    processes = []
    for index in range(COUNT):
        join = ["--processes.coordinator", f"localhost:{port}"]
        join += ["--processes.count", str(COUNT), "--processes.index", str(index)]
        if slurm:
            join = ["--processes.coordinator", "auto"]
            devices |= {
                "SLURM_JOB_ID": str(port),
                "SLURM_STEP_NODELIST": "localhost",
                "SLURM_NTASKS": str(COUNT),
            }
            devices |= {"SLURM_PROCID": str(index), "SLURM_LOCALID": str(index)}
            devices |= {"JAX_COORDINATOR_PORT": str(port)}
        command = [sys.executable, *program, *arguments, *join]
        with open(tmp_path / f"said.{index}", "w") as said:
            started = subprocess.Popen(command, env=os.environ | devices, stdout=said, stderr=said, cwd=ROOT)
        processes.append(started)
    return processes


def end(processes: list[subprocess.Popen], tmp_path) -> list[int]:
    """Wait for both; their exit codes."""
    try:
        codes = [process.wait(PATIENCE) for process in processes]
    finally:
        for process in processes:
            process.kill()
    print("".join((tmp_path / f"said.{index}").read_text() for index in range(COUNT)))  # seen when it fails
    return codes


def losses(output) -> list[float]:
    return [line["loss"] for line in read_metrics(output / METRICS_FILE) if "loss" in line]


def wait_for(path: pathlib.Path, processes) -> None:
    until = time.monotonic() + PATIENCE
    while not path.exists():
        assert time.monotonic() < until, f"{path} has not come"
        assert all(process.poll() is None for process in processes), "ended early"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def alone(model, tmp_path_factory):
    output = tmp_path_factory.mktemp("alone") / "run"
    assert finetune(options(model, output), "mamba2-jax finetune", print) == 0
    return losses(output)


def test_two_processes_train_as_one_device_does(model, alone, tmp_path):
    output = tmp_path / "run"
    mesh = {"mesh.fsdp": 4, "mesh.tensor": 2}
    assert end(start(options(model, output, **mesh), tmp_path), tmp_path) == [0, 0]
    np.testing.assert_allclose(losses(output), alone, rtol=TOLERANCE)
    assert "tensors" in (tmp_path / "said.0").read_text()  # the first one reports
    assert "model:" not in (tmp_path / "said.1").read_text()
    assert Mamba2ForCausalLM.from_pretrained(output / "model").config.n_groups == 2

    # The middle checkpoint goes on in one process, on eight devices and on one.
    for name, mesh in (("eight", {"mesh.fsdp": 8}), ("one", {})):
        again = tmp_path / name
        shutil.copytree(output, again)
        shutil.rmtree(again / "checkpoints" / str(STEPS))
        assert finetune([*options(model, again, **mesh), "--resume"], "mamba2-jax finetune", print) == 0
        np.testing.assert_allclose(losses(again), alone, rtol=TOLERANCE)


def test_adapters_and_evaluation_under_slurm(model, tmp_path):
    more = {"steps": 2, "accumulate": 2, "lora.rank": 2, "data.eval-share": 0.3}
    more["lora.targets"] = ("embeddings", "in_proj", "conv1d", "out_proj")
    mesh = {"mesh.tensor": 2, "mesh.fsdp": 2, "mesh.data": -1}
    alone, output = tmp_path / "alone", tmp_path / "run"
    assert finetune(options(model, alone, **more), "mamba2-jax finetune", print) == 0
    processes = start(options(model, output, **more, **mesh), tmp_path, slurm=True)
    assert end(processes, tmp_path) == [0, 0]
    for name in ("loss", "eval_loss"):
        got, want = (
            [line[name] for line in read_metrics(folder / METRICS_FILE) if name in line]
            for folder in (output, alone)
        )
        assert want
        np.testing.assert_allclose(got, want, rtol=TOLERANCE)
    adapted = Mamba2ForCausalLM.from_pretrained(model)
    load_lora(adapted, output / "adapter")
    ids = np.arange(16)[None]
    plain = Mamba2ForCausalLM.from_pretrained(model)
    assert not np.array_equal(adapted(ids).logits, plain(ids).logits)


def test_sigterm_to_one_process_saves_on_all(model, tmp_path):
    output = tmp_path / "run"
    many = {"mesh.data": -1, "steps": 100_000, "checkpoint.every": 100_000}
    processes = start(options(model, output, **many), tmp_path)
    wait_for(output / METRICS_FILE, processes)
    while len(losses(output)) < 3:
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    assert end(processes, tmp_path) == [128 + signal.SIGTERM] * COUNT
    (step,) = [int(folder.name) for folder in (output / "checkpoints").iterdir() if folder.name.isdigit()]
    assert step == len(losses(output)) < 100_000
    assert f"stopped by SIGTERM after step {step}" in (tmp_path / "said.0").read_text()


@pytest.mark.parametrize("victim", range(COUNT))
def test_a_killed_process_ends_the_other_with_an_error(model, victim, tmp_path):
    output = tmp_path / "run"
    many = {"mesh.data": -1, "steps": 100_000, "processes.timeout": 10}
    processes = start(options(model, output, **many), tmp_path)
    wait_for(output / METRICS_FILE, processes)
    processes[victim].kill()
    began = time.monotonic()
    codes = end(processes, tmp_path)
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] != 0
    assert time.monotonic() - began < 60  # the timeout, and a busy machine


def test_each_process_reads_the_bytes_of_its_shards(tmp_path):
    processes = start([str(tmp_path)], tmp_path, (str(IMPORT),))
    assert end(processes, tmp_path) == [0, 0]
    for index in range(COUNT):
        told = json.loads((tmp_path / f"said.{index}").read_text().splitlines()[-1])
        assert told["same"]
        assert told["read"] < 1.02 * told["bytes"] / COUNT  # half, and what every device keeps whole
        assert told["peak"] < told["local"] + 2.5 * told["largest_shard"] + (8 << 20)


def test_processes_that_cannot_find_each_other(model, tmp_path):
    with pytest.raises(ValueError, match="say how many processes there are, and which one"):
        start_processes("localhost:1234")
    with pytest.raises(ValueError, match="timeout=0 must be at least 1 second"):
        start_processes("localhost:1234", 2, 0, timeout=0)
    with pytest.raises(ValueError, match=r"needs processes\.coordinator"):
        finetune(options(model, tmp_path / "run", **{"processes.count": 2}), "mamba2-jax finetune", print)
