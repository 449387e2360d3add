"""The wheel holds all of the package and nothing else."""

import importlib.metadata
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
from mamba2_jax.pallas.triton_gpu import call as triton_call

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
    """Build the wheel from a copy, so that nothing old in a build folder gets in."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("mamba2_jax", "pallas"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = out.glob("*.whl")
    return file


def test_wheel_holds_every_file_of_the_package(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    on_disk = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "mamba2_jax").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    kernels = {
        f"mamba2_jax/{path.relative_to(ROOT).as_posix()}"
        for path in (ROOT / "pallas").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert held == on_disk | kernels
    assert {
        "mamba2_jax/py.typed",
        "mamba2_jax/pallas/__init__.py",
        "mamba2_jax/assets/tiny-python/model.safetensors",
        "mamba2_jax/assets/tiny-python/tokenizer.json",
        "mamba2_jax/assets/tiny-python/config.json",
    } <= held
    assert {name.split("/")[0] for name in held} == {"mamba2_jax"}  # no top-level `pallas`


def test_wheel_works_where_the_repository_is_not(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import mamba2_jax, mamba2_jax.pallas, mamba2_jax.cli, importlib.util as u\n"
        "print(mamba2_jax.__file__, mamba2_jax.pallas.__file__, u.find_spec('pallas'))\n"
        "mamba2_jax.cli.main(['info'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    first, rest = done.stdout.split("\n", 1)
    package = tmp_path / "mamba2_jax"
    assert first == f"{package / '__init__.py'} {package / 'pallas' / '__init__.py'} None"
    assert "2,776,928" in rest
    assert str(package) in rest.replace("\n", "")


def test_metadata(wheel):
    held = zipfile.ZipFile(wheel)
    (name,) = (name for name in held.namelist() if name.endswith(".dist-info/METADATA"))
    text = held.read(name).decode()
    assert "License-Expression: Apache-2.0" in text
    assert "Requires-Python: >=3.11" in text
    extras = set(re.findall(r"^Provides-Extra: (\w+)", text, re.MULTILINE))
    gpus, tools = {"cuda", "triton"}, {"notebooks", "docs", "dev"}
    assert extras == {"constrain", "eval", "torch", "train", "wandb"} | gpus | tools
    pins = {
        tuple(re.match(r"([\w-]+)(?:\[\w+\])?==([\d.]+)", requirement).groups())
        for requirement in re.findall(r"^Requires-Dist: (.*); .*extra == .triton.$", text, re.MULTILINE)
    }
    assert pins == {(name, versions[0]) for name, versions in triton_call.TESTED.items()}
    assert any(n.endswith("licenses/LICENSE") for n in held.namelist())
    assert "# mamba2-jax" in text  # the README


def test_installed_command():
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="mamba2-jax")
    assert script.value == "mamba2_jax.cli:main"
