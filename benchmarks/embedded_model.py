"""Make the model inside the package: a small Mamba-2 trained on Python's standard library.

    RUN=runs/tiny-python
    python benchmarks/embedded_model.py train --output $RUN      # Ctrl-C stops it; again to go on
    python benchmarks/embedded_model.py finish --output $RUN --steps 1000
    python benchmarks/embedded_model.py export --output $RUN --folder mamba2_jax/assets/tiny-python
    python benchmarks/embedded_model.py expect --folder mamba2_jax/assets/tiny-python \
        --output tests/data/expected_greedy.json
    python benchmarks/embedded_model.py table --folders new mamba2_jax/assets/tiny-python old FOLDER

`train` warms up and stays at the highest learning rate for as long as it is let; `finish` lets the rate
fall to zero from wherever `train` has come. The files are those of the running Python, one in twenty held
out by a hash of its path. All is seeded: the same Python, jax, machine and steps give the same bits.

Of Python 3.11 it reads 1,662 files, 29.2 MB, 8.7 million tokens. With the defaults (2.8 million parameters,
5.6 MB) a step of 2048 tokens took 0.95 seconds of one core of a Xeon with AMX; the model in the package has
seen 4,437 steps of `train` and 1,000 of `finish`, an hour and a half. Muon, because after 250 steps at the
best learning rate of each it was 0.2 nats ahead of AdamW; float32, because bfloat16 took as long.
"""

import ast
import hashlib
import json
import lzma
import pathlib
import re
import sysconfig
import warnings
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from matplotlib.figure import Figure

from mamba2_jax import Mamba2Cache, Mamba2Config, Mamba2ForCausalLM, generate, load_tokenizer
from mamba2_jax.tokenizer import train_tokenizer
from mamba2_jax.training import (
    CheckpointConfig,
    Checkpoints,
    DataConfig,
    OptimConfig,
    TrainConfig,
    Trainer,
    TrainState,
    make_optimizer,
    split_model,
)
from mamba2_jax.training.metrics import METRICS_FILE, read_metrics

HELD_OUT = 20  # one file in so many
PROMPTS = (
    "def fibonacci(n):\n",
    "import os\nimport sys\n\nclass ",
    "for i in range(",
    "    def __init__(self, name):\n        ",
    "try:\n    import json\nexcept ",
)
LIBRARY = pathlib.Path(sysconfig.get_paths()["stdlib"])


@dataclass(frozen=True)
class Train:
    """Train at a constant learning rate until stopped; again to go on."""

    output: pathlib.Path
    hidden_size: int = 256
    num_hidden_layers: int = 4
    state_size: int = 64
    vocab_size: int = 4096
    max_length: int = 512
    batch_size: int = 4
    learning_rate: float = 6e-3
    warmup: int = 100
    steps: int = 1_000_000
    """At most so many."""
    dtype: str = "float32"
    """Of the matrix products."""
    checkpoint_every: int = 200
    eval_every: int = 400


@dataclass(frozen=True)
class Finish(Train):
    """Let the learning rate fall to zero, from where `train` is; its options must be those of `train`."""

    steps: int = 1000
    warmup: int = 20


@dataclass(frozen=True)
class Export:
    """Write what `finish` made in transformers' form, bfloat16."""

    output: pathlib.Path
    folder: pathlib.Path


@dataclass(frozen=True)
class Expect:
    """Let transformers write with the exported weights: what the tests want this package to write."""

    folder: pathlib.Path
    output: pathlib.Path


@dataclass(frozen=True)
class Table:
    """Compare models and xz on the held-out files, and let each model write functions."""

    folders: dict[str, pathlib.Path]
    """Models by the name that they have in the table."""
    completions: int = 64


def read_library() -> tuple[dict[str, str], dict[str, str]]:
    """The library's files by path, those to train on and those held out; what is not UTF-8 is left out."""
    train, held_out = {}, {}
    for path in sorted(LIBRARY.rglob("*.py")):
        name = path.relative_to(LIBRARY).as_posix()
        if name.startswith(("site-packages/", "dist-packages/")):
            continue
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError:
            continue
        if text.strip():
            number = int.from_bytes(hashlib.sha256(name.encode()).digest()[-8:], "big")
            (held_out if number % HELD_OUT == 0 else train)[name] = text
    return train, held_out


def make_tokenizer(texts: list[str], vocab_size: int, folder: pathlib.Path):
    """Train byte-pair encoding on the training files, once; a second call finds it in the folder."""
    if not (folder / "tokenizer.json").exists():
        train_tokenizer(texts, vocab_size).save_pretrained(folder)
    return load_tokenizer(folder)


def make_model(options: Train) -> Mamba2ForCausalLM:
    config = Mamba2Config(
        hidden_size=options.hidden_size,
        num_hidden_layers=options.num_hidden_layers,
        num_heads=2 * options.hidden_size // 64,
        head_dim=64,
        state_size=options.state_size,
        n_groups=1,
        vocab_size=options.vocab_size,
        chunk_size=64,
        tie_word_embeddings=True,
        initializer_range=0.02,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    return Mamba2ForCausalLM(config, dtype=jnp.dtype(options.dtype), rngs=nnx.Rngs(0))


def make_trainer(options: Train, model: Mamba2ForCausalLM, stage: str, optim: OptimConfig) -> Trainer:
    train, held_out = read_library()
    tokenizer = make_tokenizer(list(train.values()), options.vocab_size, options.output / "tokenizer")
    config = TrainConfig(
        output=options.output / stage,
        resume=True,
        steps=options.steps,
        batch_size=options.batch_size,
        eval_every=options.eval_every,
        tensorboard=False,
        progress=False,
        data=DataConfig(max_length=options.max_length),
        optim=optim,
        checkpoint=CheckpointConfig(every=options.checkpoint_every),
    )
    return Trainer(
        model,
        config,
        [{"text": text} for text in train.values()],
        tokenizer=tokenizer,
        eval_data=[
            {"text": text} for text in list(held_out.values())[::6]
        ],  # a sixth: the table has them all
        report=print,
    )


def optimizer_of(options: Train, schedule: Literal["constant", "linear"]) -> OptimConfig:
    return OptimConfig(
        optimizer="muon",
        learning_rate=options.learning_rate,
        schedule=schedule,
        warmup=options.warmup,
        weight_decay=0.1,
        beta2=0.98,
    )


def train(options: Train) -> None:
    trainer = make_trainer(options, make_model(options), "stable", optimizer_of(options, "constant"))
    print(f"{trainer.model.config.num_parameters():,} parameters")
    print(trainer.fit())


def stable_weights(options: Train) -> Mamba2ForCausalLM:
    """The weights in the newest checkpoint of `train`."""
    structure, trained, frozen = split_model(make_model(options))
    optimizer = make_optimizer(optimizer_of(options, "constant"), trained, 1_000_000)
    state = TrainState.start(trained, optimizer, jax.random.key(0))
    checkpoints = Checkpoints(options.output / "stable" / "checkpoints", CheckpointConfig(), print)
    restored = checkpoints.restore(state)
    checkpoints.close()
    if restored is None:
        raise SystemExit(f"{options.output}: has no checkpoint of `train`")
    print(f"from step {int(restored[0].step)} of train")
    return structure.merge(restored[0].params, frozen)


def finish(options: Finish) -> None:
    model = stable_weights(options)
    trainer = make_trainer(options, model, "finish", optimizer_of(options, "linear"))
    print(trainer.fit())


def bits_of(model: Mamba2ForCausalLM, tokenizer, text: str, length: int = 1024) -> float:
    """Bits that a whole file costs, the state handed from piece to piece."""
    ids = [tokenizer.eos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
    count = len(ids) - 1
    width = length if count >= length else max(16, 1 << (count - 1).bit_length())
    pieces = -(-count // width)
    padded = np.full(pieces * width + 1, tokenizer.pad_token_id)
    padded[: len(ids)] = ids
    cache, nats = Mamba2Cache.zeros(model.config, 1, model.dtype), 0.0
    for start in range(0, pieces * width, width):
        counts = np.arange(start, start + width) < count
        piece = jnp.asarray(padded[start : start + width + 1])[None]
        lost, cache = piece_nats(model, piece, cache, jnp.asarray(counts)[None])
        nats += float(lost)
    return nats / np.log(2)


@jax.jit
def piece_nats(model, piece, cache, counts):
    out = model(piece[:, :-1], attention_mask=counts.astype(jnp.int32), cache=cache)
    scores = jax.nn.log_softmax(out.logits)
    chosen = jnp.take_along_axis(scores, piece[:, 1:, None], axis=-1)[..., 0]
    return -jnp.where(counts, chosen, 0.0).sum(), out.cache


def export(options: Export) -> None:
    """The weights as the package has them: bfloat16, with config, tokenizer and generation config."""
    model = Mamba2ForCausalLM.from_pretrained(options.output / "finish" / "model")
    model.save_pretrained(options.folder, dtype=jnp.bfloat16, tokenizer=options.output / "tokenizer")
    print(f"{options.folder}: {sum(f.stat().st_size for f in options.folder.iterdir()):,} bytes")
    print(f"{draw(options.output)}: the loss of both stages")


def expect(options: Expect) -> None:
    """Continue a few prompts greedily, without transformers' cache, in float32 on the stored weights."""
    import torch
    import transformers

    model = transformers.Mamba2ForCausalLM.from_pretrained(options.folder, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(options.folder)
    cases = []
    for prompt in PROMPTS:
        prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
        ids = torch.tensor([prompt_ids])
        with torch.no_grad():
            first = model(ids, use_cache=False).logits[0, -1].topk(5)
            for _ in range(64):
                ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        top = zip(first.indices.tolist(), first.values.tolist(), strict=True)
        cases.append(
            {
                "prompt": prompt,
                "input_ids": prompt_ids,
                "new_tokens": ids[0, len(prompt_ids) :].tolist(),
                "text": tokenizer.decode(ids[0]),
                "last_prompt_logits_top5": list(top),
            }
        )
    made_with = (
        f"transformers {transformers.__version__}, torch {torch.__version__}, "
        "float32 compute from the stored bfloat16 weights, greedy, no cache"
    )
    options.output.write_text(json.dumps({"made_with": made_with, "cases": cases}, indent=1) + "\n")
    print(*(case["text"] for case in cases), sep="\n---\n")


def draw(output: pathlib.Path) -> pathlib.Path:
    """Draw the losses of `train` and, behind them, of `finish`."""
    stages = [read_metrics(output / stage / METRICS_FILE) for stage in ("stable", "finish")]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis, tokens = figure.subplots(), 0
    for lines, name, color in zip(stages, ("constant rate", "falling rate"), ("C0", "C2"), strict=True):
        losses = [(line["tokens"], line["loss"]) for line in lines if "loss" in line]
        seen = tokens + np.cumsum([0, *(count for count, _ in losses)])  # after each step, from 0
        window = min(20, len(losses))
        means = np.convolve([loss for _, loss in losses], np.ones(window) / window, "valid")
        axis.plot(seen[len(seen) - len(means) :] / 1e6, means, color, label=f"training, {name}")
        points = [(seen[line["step"]] / 1e6, line["eval_loss"]) for line in lines if "eval_loss" in line]
        axis.plot(*zip(*points, strict=True) if points else ((), ()), f"{color}o", label=f"held out, {name}")
        tokens = seen[-1]
    axis.set(xlabel="million tokens", ylabel="nats per token")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(output / "loss.png", dpi=120)
    return output / "loss.png"


def table(options: Table) -> None:
    """Print bits per byte of the held-out files, and how many sampled functions parse."""
    _, held_out = read_library()
    sizes = {name: len(text.encode()) for name, text in held_out.items()}
    tables = [name for name in held_out if name.startswith("encodings/")]  # generated, much alike
    others = [name for name in held_out if name not in tables]
    print(f"{len(sizes)} files held out, {sum(sizes.values()):,} bytes; of them {len(tables)} in encodings/")
    print("| | parameters | bits per byte | without encodings/ | functions that parse |")
    print("|---|---|---|---|---|")

    def row(name: str, parameters: str, bits: dict[str, float], parsed: str) -> None:
        shares = (sum(bits[n] for n in names) / sum(sizes[n] for n in names) for names in (held_out, others))
        print(
            f"| {name} | {parameters} | {' | '.join(f'{share:.3f}' for share in shares)} | {parsed} |",
            flush=True,
        )

    xz = {name: 8.0 * len(lzma.compress(text.encode(), preset=9)) for name, text in held_out.items()}
    row("xz -9, file by file", "", xz, "")
    for name, folder in options.folders.items():
        model, tokenizer = Mamba2ForCausalLM.from_pretrained(folder), load_tokenizer(folder)
        bits = {file: bits_of(model, tokenizer, text) for file, text in held_out.items()}
        parsed = sum(map(parses, write_functions(model, tokenizer, held_out, options.completions)))
        row(name, f"{model.config.num_parameters():,}", bits, f"{parsed} of {options.completions}")


def write_functions(model, tokenizer, held_out: dict[str, str], count: int) -> list[str]:
    """Sampled continuations of the first lines of functions of the held-out files, each up to its end."""
    heads = [
        match[0]
        for name, text in held_out.items()
        if not name.startswith("encodings/")
        for match in re.finditer(r"^def \w+\([^()\n]*\):$", text, re.MULTILINE)
    ]
    heads = sorted(set(heads), key=lambda head: hashlib.sha256(head.encode()).digest())[:count]
    functions = []
    for index, head in enumerate(heads):
        ids = jnp.asarray([[tokenizer.eos_token_id, *tokenizer.encode(head, add_special_tokens=False)]])
        new = generate(model, ids, max_new_tokens=192, temperature=0.6, top_p=0.9, key=jax.random.key(index))
        body = tokenizer.decode(new.tokens[0, : int(new.lengths[0])], skip_special_tokens=True)
        first, *lines = body.split("\n")
        if int(new.lengths[0]) == 192:  # the budget cut the last line
            lines = lines[:-1]
        end = next((i for i, line in enumerate(lines) if line[:1].strip()), len(lines))
        functions.append("\n".join([head + first, *lines[:end]]))
    return functions


def parses(text: str) -> bool:
    """Whether Python accepts it."""
    try:
        with warnings.catch_warnings(action="ignore"):
            ast.parse(text)
    except (SyntaxError, ValueError):
        return False
    return True


if __name__ == "__main__":
    commands = {Train: train, Finish: finish, Export: export, Expect: expect, Table: table}
    chosen = tyro.cli(Train | Finish | Export | Expect | Table)
    commands[type(chosen)](chosen)
