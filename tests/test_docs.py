"""The pages: their blocks of Python run, page by page; every public name has an entry in the reference."""

import ast
import contextlib
import io
import pathlib
import re

import jax
import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SLOW = {"guides/finetune.md"}  # trains twice


def name_of(page: pathlib.Path) -> str:
    return page.relative_to(ROOT / "docs").as_posix()


def with_code() -> list:
    marks = {name: [pytest.mark.slow] for name in SLOW}
    pages = [page for page in PAGES if BLOCK.search(page.read_text())]
    return [pytest.param(page, id=name_of(page), marks=marks.get(name_of(page), [])) for page in pages]


@pytest.mark.parametrize("page", with_code())
def test_blocks_of_a_page_run_as_one_program(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    options = {name: getattr(jax.config, name) for name in ("jax_compilation_cache_dir",)}
    names: dict = {}
    text = page.read_text()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            for block in BLOCK.finditer(text):
                # tracebacks name the page and its line
                above = "\n" * (text.count("\n", 0, block.start()) + 1)
                exec(compile(above + block[1], str(page), "exec"), names)
    finally:
        for name, value in options.items():
            jax.config.update(name, value)


def test_every_page_is_in_the_navigation():
    navigation = yaml.load((ROOT / "mkdocs.yml").read_text(), _Loader)["nav"]
    assert set(map(name_of, PAGES)) <= set(leaves(navigation))


def leaves(nav):
    if isinstance(nav, str):
        return [nav]
    return [leaf for entry in (nav.values() if isinstance(nav, dict) else nav) for leaf in leaves(entry)]


class _Loader(yaml.SafeLoader):
    """Reads mkdocs.yml, whose tags name Python functions."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/name:", lambda loader, suffix, node: suffix)


@pytest.mark.parametrize(
    "module",
    ["", "config", "evaluation", "generation", "layers", "lora", "models", "ops", "training", "weights"],
)
def test_every_public_name_is_in_the_reference(module):
    entries = re.findall(r"^::: ([\w.]+)$", "".join(page.read_text() for page in PAGES), re.MULTILINE)
    tree = ast.parse((ROOT / "mamba2_jax" / module / "__init__.py").read_text())
    (public,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    assert set(public) <= {entry.rpartition(".")[2] for entry in entries}
    assert len(entries) == len(set(entries))
