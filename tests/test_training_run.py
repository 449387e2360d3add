"""Whole runs: the same bits again, also after kill -9 and SIGTERM; what goes wrong destroys nothing."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap

import jax.numpy as jnp
import numpy as np
import pytest
from training_runs import STEPS, arrays_of, make_trainer, model_folder, texts_file, tiny_model, tokenizer

from mamba2_jax import Mamba2ForCausalLM, load_tokenizer
from mamba2_jax.cli import main
from mamba2_jax.files import TOKENIZER_FILES
from mamba2_jax.lora import load_lora
from mamba2_jax.training import LoraOptions, OptimConfig, split_model
from mamba2_jax.training.metrics import read_metrics


def child(tmp_path, code: str) -> subprocess.CompletedProcess:
    """Run code in a process of its own, with the helpers of the tests at hand."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(pathlib.Path(__file__).parent)}
    folder = f"training_runs.model_folder = lambda: pathlib.Path({str(model_folder())!r})"
    code = "\n".join(["import pathlib", "import training_runs", folder, textwrap.dedent(code)])
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, timeout=300, env=environment, cwd=tmp_path,
    )  # fmt: skip


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run of 20 steps that nothing interrupts: its folder and its weights."""
    output = tmp_path_factory.mktemp("runs") / "straight"
    trainer = make_trainer(output)
    result = trainer.fit()
    assert (result.step, result.skipped, result.stopped_by) == (STEPS, 0, None)
    return output, arrays_of(trainer)


def losses(output: pathlib.Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(output / "metrics.jsonl")]


def assert_same_run(trainer, output, straight):
    folder, arrays = straight
    for name, array in arrays_of(trainer).items():
        np.testing.assert_array_equal(array, arrays[name], err_msg=name)
    assert losses(output) == losses(folder)


def test_a_run_learns_and_leaves_its_result(straight):
    output, arrays = straight
    lines = losses(output)
    assert [step for step, _ in lines] == list(range(1, STEPS + 1))
    assert lines[-1][1] < 0.8 * lines[0][1]
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["15", "20"]
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    again = Mamba2ForCausalLM.from_pretrained(output / "model")
    np.testing.assert_array_equal(again.backbone.norm_f.weight[...], arrays["backbone.norm_f.weight"])
    assert (output / "model" / "tokenizer.json").exists()


def test_a_second_run_has_the_same_bits(straight, tmp_path):
    trainer = make_trainer(tmp_path / "again")
    trainer.fit()
    assert_same_run(trainer, tmp_path / "again", straight)


def test_killed_while_it_saves_it_goes_on_to_the_same_bits(straight, tmp_path):
    output = tmp_path / "run"
    done = child(
        tmp_path,
        f"""
        import os, signal, threading, time
        from training_runs import make_trainer
        output, texts = pathlib.Path({str(output)!r}), pathlib.Path({str(texts_file())!r})

        def kill_in_mid_save():
            while True:
                folders = os.listdir(output / "checkpoints") if (output / "checkpoints").exists() else []
                if any(name.startswith("15.") for name in folders):
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(0.0002)

        threading.Thread(target=kill_in_mid_save, daemon=True).start()
        make_trainer(output, texts).fit()
        """,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = {path.name for path in (output / "checkpoints").iterdir()}
    assert "10" in left
    assert "15" not in left
    assert any(name.startswith("15.") for name in left)
    assert not (output / "model").exists()
    trainer = make_trainer(output, resume=True)
    assert trainer.fit().step == STEPS
    assert_same_run(trainer, output, straight)


def test_sigterm_saves_and_exits_and_it_goes_on_to_the_same_bits(straight, tmp_path):
    output = tmp_path / "run"
    options = (
        f"finetune --model {model_folder()} --data {texts_file()} --output {output} --steps {STEPS}"
        " --batch-size 2 --data.max-length 48 --optim.learning-rate 1e-2 --optim.warmup 3"
        " --checkpoint.every 5 --no-tensorboard --no-progress --dtype float32"
    ).split()
    done = child(
        tmp_path,
        f"""
        import os, signal, sys
        from mamba2_jax.cli import main
        from mamba2_jax.training.metrics import Metrics
        write = Metrics.write

        def write_and_stop(self, step, values):
            write(self, step, values)
            if step == 8:
                os.kill(os.getpid(), signal.SIGTERM)

        Metrics.write = write_and_stop
        sys.exit(main({options!r}))
        """,
    )
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert "stopped by SIGTERM after step 8; --resume goes on" in done.stderr
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["5", "8"]
    trainer = make_trainer(output, resume=True)
    assert trainer.fit().step == STEPS
    assert_same_run(trainer, output, straight)


def test_a_full_disk_is_told_and_leaves_the_last_checkpoint(straight, tmp_path):
    output = tmp_path / "run"
    done = child(
        tmp_path,
        f"""
        import resource, time
        from mamba2_jax.training.metrics import Metrics
        from training_runs import make_trainer
        write = Metrics.write

        def write_and_fill(self, step, values):
            write(self, step, values)
            if step == 7:  # no file may grow beyond this any more: writing fails as on a full disk
                while not (output / "checkpoints" / "5").exists():
                    time.sleep(0.01)
                resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))

        Metrics.write = write_and_fill
        output = pathlib.Path({str(output)!r})
        make_trainer(output, pathlib.Path({str(texts_file())!r})).fit()
        """,
    )
    assert done.returncode == 1
    assert "mamba2_jax.training.checkpoint.SaveError: " in done.stderr
    assert "the last good one is of step 5" in done.stderr
    trainer = make_trainer(output, resume=True)
    assert trainer.fit().step == STEPS
    assert_same_run(trainer, output, straight)


@pytest.fixture
def copied(straight, tmp_path):
    """A copy of the finished run, to be damaged."""
    return pathlib.Path(shutil.copytree(straight[0], tmp_path / "copy"))


def test_the_newest_whole_checkpoint_is_restored(straight, copied):
    def take(part: str, *, of: str, into: str) -> None:
        """Whole files, but another step's: only our checksums can tell."""
        shutil.rmtree(copied / "checkpoints" / into / part)
        shutil.copytree(copied / "checkpoints" / of / part, copied / "checkpoints" / into / part)

    take("arrays", of="15", into="20")
    (copied / "checkpoints" / "25").mkdir()  # what a crash of another kind may leave
    said = []
    trainer = make_trainer(copied, resume=True, report=said.append)
    assert trainer.fit().step == STEPS
    assert_same_run(trainer, copied, straight)
    damaged = [line for line in said if "damaged" in line]
    assert [line.split(":")[0] for line in damaged] == ["checkpoint of step 25", "checkpoint of step 20"]
    assert "do not match their checksums" in damaged[1]
    assert "going on from step 15 of 20" in said
    aside = {path.name for path in (copied / "checkpoints-damaged").iterdir()}
    assert aside == {"20.0", "25.0"}
    take("arrays", of="15", into="20")
    take("meta", of="20", into="15")
    with pytest.raises(ValueError, match=r"not one of the checkpoints of steps \[15, 20\] is whole"):
        make_trainer(copied, resume=True).fit()


def test_a_flipped_bit_is_noticed_or_was_not_in_use(copied):
    """At places all over the files of a checkpoint: what is restored always has the bits that were saved.

    In a process of its own: where one read fails, those that Orbax gives up complain at any time later.
    """
    checkpoint = copied / "checkpoints" / str(STEPS)
    shutil.rmtree(checkpoint.with_name("15"))
    done = child(
        copied,
        f"""
        import jax, numpy as np
        from training_runs import make_trainer
        from mamba2_jax.training import CheckpointConfig
        from mamba2_jax.training.checkpoint import Checkpoints, _flatten
        from mamba2_jax.training.step import TrainState

        checkpoint = pathlib.Path({str(checkpoint)!r})
        trainer = make_trainer(pathlib.Path("elsewhere"), pathlib.Path({str(texts_file())!r}))
        like = TrainState.start(trainer._trained, trainer._optimizer, jax.random.key(0))
        checkpoints = Checkpoints(checkpoint.parent, CheckpointConfig())
        everything = lambda state, extra: (jax.device_get(_flatten(state)), extra)
        saved, noticed = everything(*checkpoints.restore(like)), 0
        for file in [path for path in checkpoint.rglob("*") if path.is_file() and path.stat().st_size > 4000]:
            content = file.read_bytes()
            for place in np.random.default_rng(0).integers(len(content), size=10):
                file.write_bytes(content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :])
                try:
                    restored = checkpoints.restore(like)
                except ValueError as error:
                    assert "not one of the checkpoints of steps [20] is whole" in str(error), error
                    noticed += 1
                else:
                    jax.tree.map(np.testing.assert_array_equal, everything(*restored), saved)
            file.write_bytes(content)
        print(noticed)
        """,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "the run there has seed=0, this one 1"),
        ({"batch_size": 3}, "batch_size=2, this one 3"),
        ({"data": [{"text": "other words."}]}, r"the tokenized training data \(data\) are other ones"),
        ({"lora": LoraOptions(rank=2)}, "the run there has lora.rank=None, this one 2"),
        ({"optim": OptimConfig(learning_rate=1e-2, warmup=4)}, "optim.warmup=3, this one 4"),
        ({"optim": OptimConfig(learning_rate=1e-3, warmup=3)}, "learning_rate=0.01, this one 0.001; give"),
        ({"steps": STEPS - 1}, "the run there has 20 steps, this one 19; give as many"),
    ],
)
def test_a_run_goes_on_only_as_it_began(copied, change, message):
    before = sorted(path.name for path in copied.rglob("*"))
    with pytest.raises(ValueError, match=message):
        make_trainer(copied, resume=True, **change).fit()
    assert sorted(path.name for path in copied.rglob("*")) == before


def test_rows_take_turns_on_a_cpu_or_where_the_option_says_so(tmp_path, monkeypatch):
    batch = {"input_ids": np.ones((8, 48), int)}

    def shape(**options):
        return make_trainer(tmp_path / "run", **options)._in_turns(batch)["input_ids"].shape

    monkeypatch.setattr("mamba2_jax.training.trainer.tokens_in_cache", lambda hidden_size: 96 + hidden_size)
    assert shape() == (4, 2, 48)
    assert shape(tokens_per_turn=48) == (8, 1, 48)
    assert shape(tokens_per_turn=0) == (8, 48)
    monkeypatch.setattr("mamba2_jax.training.on_cpu.platform", lambda: "gpu")
    assert shape() == (8, 48)
    assert shape(tokens_per_turn=192) == (2, 4, 48)


def test_steps_that_are_not_finite_end_the_run_and_name_the_tensor(tmp_path):
    trainer = make_trainer(tmp_path / "run", max_skipped=2)
    name = "backbone.layers.0.norm.weight"
    trainer._trained[name] = jnp.full_like(trainer._trained[name], jnp.inf)
    with pytest.raises(FloatingPointError, match=f"step 2: 2 steps in a row .* is parameter {name}"):
        trainer.fit()


def test_weights_and_biases_gets_the_numbers_and_goes_on_with_its_run(tmp_path, monkeypatch):
    """Offline: what would be sent is in a file."""
    pytest.importorskip("wandb", reason="the wandb extra")
    monkeypatch.setenv("WANDB_MODE", "offline")
    code = """
    from mamba2_jax.training.metrics import Metrics
    settings = {"lora": {"rank": 8}}
    metrics = Metrics(pathlib.Path("."), after=0, tensorboard=False, wandb="a-project", settings=settings)
    metrics.write(1, {"loss": 2.5})
    metrics.close()
    """
    for _ in range(2):
        done = child(tmp_path, code)
        assert done.returncode == 0, done.stderr
    name = (tmp_path / "wandb-id").read_text()
    sent = list(tmp_path.glob(f"wandb/offline-run-*-{name}/run-{name}.wandb"))
    assert len(sent) == 2
    assert all(
        word in file.read_bytes() for file in sent for word in (b"loss", b"2.5", b"a-project", b"lora")
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lora.rank", "0"], "rank=0; want an integer of at least 1"),
        (["--lora.rank", "2", "--lora.targets", "q_proj"], "no module 'q_proj' that takes an adapter"),
        (["--steps", "0"], "steps=0 must be an integer of at least 1"),
        (["--tokens-per-turn", "-1"], "tokens_per_turn=-1 must be an integer of at least 0"),
        (["--optim.warmup", "20"], "warmup=20 leaves nothing of 20 steps"),
        (["--lora.dropout", "0.1"], "dropout=0.1 needs a rank"),
        (["--lora.targets", "conv1d"], "targets=('conv1d',) needs a rank"),
        (["--epochs", "2"], "steps=20 and epochs=2 both say how long the run is"),
        (["--eval-every", "5"], "eval_every=5 needs evaluation data"),
        (["--new-learning-rate"], "new_learning_rate needs resume"),
        (["--optim.final", "0.1", "--optim.schedule", "constant"], "final=0.1 needs a schedule that falls"),
        (["--optim.decay", "0.1"], "decay=0.1 needs schedule='wsd'"),
        (["--optim.learning-rate", "inf"], "learning_rate=inf is out of range"),
        (["--wandb", ""], "wandb is empty"),
        (["--processes.timeout", "5"], "processes.timeout needs processes.coordinator"),
        (["--config", "nofile.yaml"], "config=nofile.yaml: no such file"),
        (["--data", "gs://bucket/texts"], "gs://bucket/texts: only folders and files of this machine"),
        (["--output", "s3://bucket/run"], "s3://bucket/run: only folders and files of this machine"),
        (["--data", "missing.jsonl"], "missing.jsonl: no such file or folder"),
        (["--data", "empty.jsonl"], "no usable record in empty.jsonl"),
        (["--output", "used"], "is not empty; go on from what is in it with resume"),
        (["--output", "empty.jsonl"], "is a file; name a folder"),
    ],
)
def test_bad_options_are_told(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("empty.jsonl").write_text('{"text": ""}\n{"words": "one"}\n')
    pathlib.Path("used").mkdir()
    pathlib.Path("used", "notes.txt").write_text("mine")
    base = {"--model": str(model_folder()), "--data": str(texts_file()), "--output": "new", "--steps": "20"}
    arguments = [word for name, value in base.items() if name not in options for word in (name, value)]
    arguments += options
    try:
        code = main(["finetune", *arguments])
    except SystemExit as error:  # of the parser
        code = error.code
    assert code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert {path.name for path in pathlib.Path("new").glob("*")} <= {"tokens"}
    assert pathlib.Path("used", "notes.txt").read_text() == "mine"


def test_adapters_evaluation_and_a_config_file(tmp_path, capsys):
    config = {
        "model": str(model_folder()),
        "data": {"files": str(texts_file()), "max_length": 48, "eval_share": 0.1},
        "output": str(tmp_path / "run"),
        "steps": 9,
        "batch_size": 2,
        "eval_every": 4,
        "progress": False,
        "lora": {"rank": 2, "targets": ["embeddings", "in_proj", "out_proj"], "merge": True, "dropout": 0.1},
        "optim": {"learning_rate": 2e-2},
    }
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(config))  # JSON is YAML
    assert main(["finetune", "--config", str(file), "--steps", "8"]) == 0
    assert "PEFT takes no adapter on out_proj" in capsys.readouterr().err
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    held_out = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in held_out] == [0, 4, 8]
    assert held_out[2]["eval_loss"] < held_out[1]["eval_loss"] < held_out[0]["eval_loss"]
    # every character but the first is a byte; the end is a token without one
    for line in held_out:
        np.testing.assert_allclose(line["eval_perplexity"], np.exp(line["eval_loss"]))
        ratio = line["eval_bits_per_byte"] / (line["eval_loss"] / np.log(2))
        assert 1 < ratio < 1.1
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    merged = Mamba2ForCausalLM.from_pretrained(tmp_path / "run" / "model")
    base = tiny_model()
    assert (merged.backbone.layers[0].mixer.A_log[...] == base.backbone.layers[0].mixer.A_log[...]).all()
    assert not (merged.backbone.embeddings.weight[...] == base.backbone.embeddings.weight[...]).all()
    assert tokenizer().eos_token_id == merged.config.eos_token_id
    # the run's own record of its options starts it again, or goes on
    assert main(["finetune", "--config", str(tmp_path / "run" / "options.json"), "--resume"]) == 0
    assert "8 steps; metrics" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "wants names and values of options"),
        ("output: x", "data is missing"),
        ("{data: a, output: x, stepps: 3}", "there is no option 'stepps'"),
        ("{data: a, output: x, steps: many}", "steps='many' is none of int, nothing"),
        ("{data: a, output: x, optim: {learning_rate: fast}}", "learning_rate='fast' is not float"),
        ("{data: [", "cannot be read as JSON or YAML"),
    ],
)
def test_bad_config_files_are_told(text, message, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert main(["finetune", "--config", str(file)]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_no_option_at_all_is_told(capsys):
    with pytest.raises(SystemExit):
        main(["finetune"])
    err = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "--data" in err
    assert "--output" in err


def test_a_checkpoint_without_a_tokenizer_is_tuned_from_a_template_and_an_adapter(tmp_path, capsys):
    pytest.importorskip("torch")
    bare = tmp_path / "bare"
    tiny_model().save_pretrained(bare, format="state-spaces")
    for file in (file for pattern in TOKENIZER_FILES for file in bare.glob(pattern)):
        file.unlink()
    chats = [{"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two."}]}]
    pathlib.Path(tmp_path, "chats.json").write_text(json.dumps(chats * 8, indent=1))
    template = "{% for m in messages %}{{ m.content + '\n' }}{% endfor %}"
    pathlib.Path(tmp_path, "template.jinja").write_text(template)

    def run(output, *options):
        common = f"--model {bare} --data {tmp_path}/chats.json --output {tmp_path / output} --batch-size 2"
        common += " --steps 2 --no-tensorboard --no-progress --optim.warmup 0 --data.max-length 48"
        return main(["finetune", *common.split(), *options])

    assert run("none") == 2
    assert "--tokenizer EleutherAI/gpt-neox-20b on the command line" in capsys.readouterr().err
    ours = ("--tokenizer", str(model_folder()))
    assert run("none", *ours) == 2
    assert "name one with data.chat_template (--data.chat-template FILE)" in capsys.readouterr().err
    ours += ("--data.chat-template", str(tmp_path / "template.jinja"))
    assert run("first", *ours, "--lora.rank", "2", "--lora.targets", "in_proj", "--lora.merge") == 0
    saved = load_tokenizer(tmp_path / "first" / "model")
    assert saved.chat_template == template
    assert "8 texts, 8 documents" in capsys.readouterr().err

    # another run begins from this one's adapter
    trainer = make_trainer(tmp_path / "second", lora=LoraOptions(init=str(tmp_path / "first" / "adapter")))
    begun = arrays_of(trainer)
    model = tiny_model()
    load_lora(model, tmp_path / "first" / "adapter")
    _, wanted, _ = split_model(model)
    assert begun.keys() == wanted.keys()
    for name, array in wanted.items():
        assert array.any()
        np.testing.assert_array_equal(begun[name], array)
    with pytest.raises(ValueError, match="rank=4 is set beside init, whose adapter has its own"):
        LoraOptions(rank=4, init="adapter")
    with pytest.raises(FileNotFoundError, match="nowhere/at/all: no such folder"):
        make_trainer(tmp_path / "third", lora=LoraOptions(init="nowhere/at/all"))
