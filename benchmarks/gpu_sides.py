"""What `benchmarks/gpu.py` times, each in a process of its own: ours and transformers, reading and training.

A side returns the logits after a prompt, and seconds by name: the median of some calls, and the first; or, in
words, why there are none.
"""

import pathlib
import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np

PROMPTS = ((1, 2048), (8, 2048))  # rows and tokens of a prompt
DECODED = ((1, 64), (8, 64), (64, 64))  # rows, and tokens decoded for each
BATCHES = ((1, 2048), (8, 2048))  # of a training step
ROUNDS = 5
DEVICE = "cuda"  # of PyTorch

Seconds = dict[str, tuple[float, float] | str]


def write(folder: pathlib.Path, preset: str) -> None:
    """Write a checkpoint with random weights, by transformers, in bfloat16."""
    import torch
    import transformers

    from mamba2_jax import Mamba2Config

    # transformers 5.23 divides out_proj by sqrt(layers) once more at loading when this option is set.
    config = Mamba2Config.preset(preset).replace(rescale_prenorm_residual=False)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(DEVICE):
        fields = {name: value for name, value in config.to_dict().items() if name != "time_step_limit"}
        model = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**fields))
    model.save_pretrained(folder)


def ours_reading(folder: pathlib.Path, weights: str) -> dict:
    import jax
    import jax.numpy as jnp

    from mamba2_jax import Mamba2ForCausalLM, generate

    quantized = {} if weights == "bfloat16" else {"quantize": weights}
    model = Mamba2ForCausalLM.from_pretrained(folder, dtype="bfloat16", param_dtype="bfloat16", **quantized)
    read = jax.jit(lambda model, ids: model(ids, logits_to_keep=1).logits)
    logits = np.asarray(read(model, tokens(1, 300)), np.float32)[0, -1]
    seconds: Seconds = {}
    for rows, length in PROMPTS:
        ids = jnp.asarray(tokens(rows, length))
        call = partial(lambda ids: read(model, ids).block_until_ready(), ids)
        seconds[prompt_name(rows, length)] = guarded(timed, call)
    for rows, count in DECODED:
        prompt = jnp.asarray(tokens(rows, 16))

        def decode(count, prompt=prompt):
            return generate(model, prompt, max_new_tokens=count, eos_token_id=()).tokens.block_until_ready()

        seconds[decode_name(rows)] = guarded(per_token, decode, count)
    return {"logits": logits.tolist(), "seconds": seconds}


def ours_training(folder: pathlib.Path, weights: str) -> dict:
    """Also return the operations per token, and the device's peak, from which the MFU follows."""
    import jax

    from mamba2_jax import Mamba2ForCausalLM
    from mamba2_jax.training import OptimConfig, TrainState, make_optimizer, split_model, train_step
    from mamba2_jax.training.speed import operations_per_token, peak_operations

    model = Mamba2ForCausalLM.from_pretrained(folder, dtype="bfloat16", param_dtype="float32")
    config = model.config
    structure, trained, frozen = split_model(model)
    operations = operations_per_token(config, trained, frozen)
    optimizer = make_optimizer(OptimConfig(schedule="constant"), trained, 100)
    state = TrainState.start(trained, optimizer, jax.random.key(0))
    del model, trained

    def step(inputs):
        nonlocal state
        state, metrics = train_step(
            state, frozen, inputs, structure=structure, optimizer=optimizer, remat="block"
        )
        return float(metrics.loss)

    seconds: Seconds = {}
    for batch in BATCHES:
        seconds[batch_name(*batch)] = guarded(timed, partial(step, {"input_ids": tokens(*batch)}))
    peak = peak_operations(jax.devices()[0], "bfloat16")
    return {"seconds": seconds, "operations": operations, "peak": peak}


def theirs_reading(folder: pathlib.Path, weights: str) -> dict:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    model = transformers.Mamba2ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(DEVICE).eval()
    seconds: Seconds = {}
    with torch.no_grad():
        ids = torch.tensor(tokens(1, 300)).to(DEVICE)
        logits = model(ids, logits_to_keep=1).logits.float().cpu().numpy()[0, -1]

        def read(ids):
            model(ids, use_cache=True, logits_to_keep=1)
            wait(torch)

        for rows, length in PROMPTS:
            ids = torch.tensor(tokens(rows, length)).to(DEVICE)
            seconds[prompt_name(rows, length)] = guarded(timed, partial(read, ids))
        for rows, count in DECODED:
            prompt = torch.tensor(tokens(rows, 16)).to(DEVICE)

            def decode(count, prompt=prompt):
                model.generate(
                    prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False, use_cache=True
                )
                wait(torch)

            seconds[decode_name(rows)] = guarded(per_token, decode, count)
    return {"logits": logits.tolist(), "seconds": seconds}


def theirs_training(folder: pathlib.Path, weights: str) -> dict:
    import torch
    import transformers

    model = transformers.Mamba2ForCausalLM.from_pretrained(folder, dtype=torch.float32).to(DEVICE).train()
    # the newer name of the same
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step(ids):
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    seconds: Seconds = {}
    for batch in BATCHES:
        seconds[batch_name(*batch)] = guarded(timed, partial(step, torch.tensor(tokens(*batch)).to(DEVICE)))
    return {"seconds": seconds}


SIDES: dict[str, dict[str, Callable[[pathlib.Path, str], dict]]] = {
    "reading": {"ours": ours_reading, "transformers": theirs_reading},
    "training": {"ours": ours_training, "transformers": theirs_training},
}


def tokens(rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 50000, (rows, length))


def prompt_name(rows: int, length: int) -> str:
    return f"prompt, {rows} x {length} tokens"


def decode_name(rows: int) -> str:
    return f"decode, {rows} rows, a token"


def batch_name(rows: int, length: int) -> str:
    return f"training step, {rows} x {length} tokens"


def tokens_of(what: str) -> int:
    """Count the tokens that a time is for, from its name."""
    first, *rest = (int(word) for word in what.split() if word.isdigit())
    return first * (rest[0] if rest else 1)


def wait(torch) -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def timed(call) -> tuple[float, float]:
    """The median of some calls, and the first; in seconds."""
    times = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]), times[0]


def per_token(decode, count: int) -> tuple[float, float]:
    """Seconds of a token: the prompt's cost falls out of the difference."""
    one, first = timed(lambda: decode(1))
    return (timed(lambda: decode(count + 1))[0] - one) / count, first


def guarded(measure, *arguments):
    """What `measure` returns; or in words why it could not."""
    try:
        return measure(*arguments)
    except Exception as error:
        said = str(error)
        if "out of memory" in said.lower() or "RESOURCE_EXHAUSTED" in said:
            return "out of memory"
        return f"{type(error).__name__}: {said[:80]}"
