"""Add pages to the site that are files elsewhere in the repository, and draw what others draw in a browser.

- `notebooks/*.ipynb` -> `tutorials/`, with the outputs that are stored in them
- `benchmarks/results/` -> `performance/`
- `CHANGELOG.md`, `CONTRIBUTING.md`, `CITATION.cff` -> their pages
- the line `{{ rooms }}` -> the diagram of `ARROWS` in `tests/test_architecture.py`
- formulas -> MathML, which browsers draw without a script
"""

import ast
import base64
import html
import json
import pathlib
import re

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parents[1]
ANSI = re.compile(r"\x1b\[[0-9;]*m")


def on_files(files, config):
    """Add the generated pages and their pictures."""
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        text, pictures = notebook_page(json.loads(path.read_text()), path.stem)
        files.append(File.generated(config, f"tutorials/{path.stem}.md", content=text))
        for name, data in pictures.items():
            files.append(File.generated(config, f"tutorials/{name}", content=data))
    for path in sorted((ROOT / "benchmarks" / "results").iterdir()):
        files.append(File.generated(config, f"performance/{path.name}", abs_src_path=str(path)))
    for name in ("CHANGELOG", "CONTRIBUTING"):
        text = (ROOT / f"{name}.md").read_text()
        files.append(File.generated(config, f"{name.lower()}.md", content=site_links(text)))
    return files


def site_links(text: str) -> str:
    """Lead links to files of the repository, which the site has as pages, to these pages."""
    text = re.sub(r"\]\((?:\.\./)?docs/", "](", text)
    text = re.sub(r"\]\((?:\.\./)?benchmarks/results/", "](../performance/", text)
    return re.sub(r"\]\((?:\.\./)?notebooks/(\w+)\.ipynb", r"](../tutorials/\1.md", text)


def notebook_page(notebook: dict, name: str) -> tuple[str, dict[str, bytes]]:
    """Convert a notebook to Markdown; return it with its pictures by file name."""
    blocks, pictures = [], {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            blocks.append(site_links(source))
            continue
        blocks.append(f"```python\n{source}\n```")
        for out in cell["outputs"]:
            data = out.get("data", {})
            if "image/png" in data:
                picture = f"{name}_{len(pictures)}.png"
                pictures[picture] = base64.b64decode("".join(data["image/png"]))
                blocks.append(f"![Output of the cell above]({picture}){{ .output }}")
            else:
                text = ANSI.sub("", "".join(out.get("text", data.get("text/plain", "")))).rstrip()
                blocks.append(f'<pre class="output">{html.escape(text)}</pre>')
    first, rest = blocks[0], blocks[1:]
    link = f"*This page is a notebook, `notebooks/{name}.ipynb`, with the outputs of a run on a CPU.*"
    return "\n\n".join([first, link, *rest]), pictures


def on_page_markdown(markdown, page, config, files):
    """Fill in the diagram of the rooms, and the citation; give the tables of results the whole width."""
    if page.file.src_uri.startswith("performance/") and page.file.name != "index":
        page.meta["hide"] = ["toc"]
    # links to source files, which the site does not have, lead somewhere in the repository only
    markdown = re.sub(r"\[([^]]+)\]\((?:\.\./)+(?:mamba2_jax|pallas|tests)/[^)]*\)", r"\1", markdown)
    if "{{ rooms }}" in markdown:
        markdown = markdown.replace("{{ rooms }}", rooms_diagram())
    if "{{ citation }}" in markdown:
        text = (ROOT / "CITATION.cff").read_text()
        markdown = markdown.replace("{{ citation }}", f"```yaml\n{text}```")
    return markdown


def rooms_diagram() -> str:
    """Draw who may import whom; arrows that follow from others are left away."""
    tree = ast.parse((ROOT / "tests" / "test_architecture.py").read_text())
    (arrows,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ARROWS"
    )
    arrows = {room: set(text.split()) for room, text in arrows.items() if room != "__init__"}
    below = {}
    for room in arrows:
        reachable(room, arrows, below)
    lines = ["```mermaid", "flowchart TD"]
    for room, imported in arrows.items():
        direct = {one for one in imported if not any(one in below[other] for other in imported - {one})}
        lines += [f"    {room} --> {one}" for one in sorted(direct)]
    return "\n".join([*lines, "```"])


def reachable(room: str, arrows: dict[str, set[str]], below: dict[str, set[str]]) -> set[str]:
    """Collect in `below` the rooms that can be reached from a room."""
    if room not in below:
        below[room] = arrows[room].union(*(reachable(one, arrows, below) for one in arrows[room]))
    return below[room]


def on_page_content(content, page, config, files):
    """Draw formulas as MathML."""

    def inline(match):
        return convert(html.unescape(match[1]))

    def block(match):
        return convert(html.unescape(match[1]), display="block")

    content = re.sub(r'<span class="arithmatex">\\\((.*?)\\\)</span>', inline, content, flags=re.DOTALL)
    return re.sub(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', block, content, flags=re.DOTALL)
