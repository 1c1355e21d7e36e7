"""Every notebook runs from its first cell to its last, and is kept without outputs."""

import json
import os
from pathlib import Path

import nbclient
import nbformat
import pytest

import tiny

FOLDER = Path(__file__).parents[1] / "examples" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_not_kept(path):
    cells = json.loads(path.read_text())["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


@pytest.mark.slow
@tiny.TRANSFORMERS_5
@pytest.mark.filterwarnings("default")  # of the client and its sockets
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path, monkeypatch):
    monkeypatch.setitem(os.environ, "PYDEVD_DISABLE_FILE_VALIDATION", "1")
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}
    ).execute()
    errors = [out for cell in notebook.cells for out in cell.get("outputs", []) if out.output_type == "error"]
    assert not errors
    shown = [out for cell in notebook.cells for out in cell.get("outputs", []) if "data" in out]
    pictures = [out for out in shown if "image/png" in out.data or "<img" in out.data.get("text/html", "")]
    assert pictures
