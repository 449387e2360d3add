"""The README's quickstart runs as it stands, and what it points at exists."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_quickstart_runs(capsys):
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in block.splitlines() if line]) <= 11
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    tokens = names["new"].tokens[0]
    assert tokens.shape == (32,)
    out = capsys.readouterr().out
    assert out.startswith(names["tokenizer"].decode(tokens))
    assert len(out) > 100


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", README))))
def test_links_lead_to_files(target):
    assert (ROOT / target).exists()


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda page: page.name)
def test_links_of_pages_to_source_lead_to_files(page):
    """Links among pages are checked when the site is built, which drops those to source files."""
    targets = re.findall(
        r"\]\((?:\.\./)+((?:mamba2_jax|pallas|tests)/[^)#]+)\)", page.read_text(encoding="utf-8")
    )
    assert all((ROOT / target).exists() for target in targets)


def test_named_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"^make ([\w-]+)", README, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100


def test_extras_are_the_ones_of_the_package():
    pyproject = (ROOT / "pyproject.toml").read_text()
    section = pyproject.split("[project.optional-dependencies]")[1].split("\n[")[0]
    table = (ROOT / "docs" / "index.md").read_text().split("| extra | for |")[1].split("\n\n")[0]
    named = {
        name
        for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
        for name in re.findall(r"`(\w+)`", row)
    }
    assert named == set(re.findall(r"^(\w+) = ", section, re.MULTILINE))
