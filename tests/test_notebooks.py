"""Every notebook runs from top to bottom, and is stored with the outputs of a run."""

import pathlib

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted((ROOT / "notebooks").glob("*.ipynb"))
# What a test makes smaller, and how: the run that is stored takes minutes.
SMALLER = {
    "05_train_from_scratch": {
        "STATES = (4, 8, 16, 32)": "STATES = (4,)",
        "STEPS, ROWS = 250, 64": "STEPS, ROWS = 10, 2",
    },
}


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def check_outputs(cells):
    for cell in cells:
        assert cell.outputs, f"this cell shows nothing:\n{cell.source}"
        assert not [out for out in cell.outputs if out.output_type == "error" or out.get("name") == "stderr"]
    assert any("image/png" in out.get("data", {}) for cell in cells for out in cell.outputs)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_stored_with_the_outputs_of_one_run(file):
    cells = code_cells(nbformat.read(file, as_version=4))
    check_outputs(cells)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert str(ROOT) not in file.read_text()


def test_outputs_are_small():
    assert sum(file.stat().st_size for file in FILES) < 450_000


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_runs(file, monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it advises to install PyTorch
    notebook = nbformat.read(file, as_version=4)
    source = "".join(cell.source for cell in code_cells(notebook))
    assert all(source.count(line) == 1 for line in SMALLER.get(file.stem, {}))
    for cell in code_cells(notebook):
        cell.outputs = []
        for line, smaller in SMALLER.get(file.stem, {}).items():
            cell.source = cell.source.replace(line, smaller)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    check_outputs(code_cells(notebook))
