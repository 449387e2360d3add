"""Run the notebooks and store them with their outputs, which the pages of the tutorials show.

    python docs/run_notebooks.py [NAME...]    # names as 01_quickstart; without any, all of them

Pictures are stored with 128 colours and few dots, which keeps all outputs small.
"""

import base64
import io
import os
import pathlib
import sys
import tempfile

import nbclient
import nbformat
from PIL import Image

FOLDER = pathlib.Path(__file__).parents[1] / "notebooks"
COLOURS, WIDTH = 128, 760
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_backend_optimization_level=0",  # half of the time is LLVM's
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
}


def run(file: pathlib.Path) -> None:
    """Execute one notebook in an empty folder and write it back with outputs."""
    notebook = nbformat.read(file, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times, which change from run to run
        if cell.cell_type == "code":
            cell.outputs = joined(cell.outputs)
        for out in cell.get("outputs", []):
            if out.output_type in ("display_data", "execute_result") and "image/png" in out.data:
                out.data = {"image/png": smaller(out.data["image/png"])}
    notebook.metadata.get("language_info", {}).pop("version", None)
    nbformat.write(notebook, file)


def joined(outputs: list) -> list:
    """Join what was printed in several parts, and take the folder of this checkout out of it."""
    result = []
    for out in outputs:
        if out.output_type == "stream" and result and result[-1].get("name") == out.name:
            result[-1].text += out.text
        else:
            result.append(out)
    for out in result:
        if out.output_type == "stream":
            out.text = out.text.replace(f"{FOLDER.parent}{os.sep}", "")
    return result


def smaller(png: str) -> str:
    """Reduce a base64 PNG to at most `WIDTH` dots and `COLOURS` colours."""
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    if image.width > WIDTH:
        image = image.resize((WIDTH, round(image.height * WIDTH / image.width)), Image.Resampling.BOX)
    out = io.BytesIO()
    image.quantize(COLOURS, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return base64.b64encode(out.getvalue()).decode()


if __name__ == "__main__":
    os.environ.update(ENVIRONMENT)
    for name in sys.argv[1:] or sorted(path.stem for path in FOLDER.glob("*.ipynb")):
        run(FOLDER / f"{name}.ipynb")
