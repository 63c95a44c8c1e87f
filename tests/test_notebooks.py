"""The notebooks run from top to bottom and show what they promise. They need nbclient: make notebooks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "docs" / "notebooks").glob("*.ipynb"))


def execute(path: Path, folder: Path) -> Any:
    """The notebook with its outputs; an exception in a cell is raised here."""
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient: make notebooks")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # set for the tests of the kernels; slow
    notebook = execute(path, tmp_path)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    shown = [output.data for output in outputs if "data" in output]
    tables = [data["text/html"] for data in shown if "text/html" in data]
    assert len(tables) == 2
    assert all("<table>" in table and "achieved" in table for table in tables)
    assert len([data for data in shown if "image/png" in data]) == 2
    texts = "".join(output.text for output in outputs if output.output_type == "stream")
    assert re.search("Use (framefusion|uniformframes) at a budget of", texts)  # whichever was quicker just now
    assert "Error" not in texts


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs(path):
    text = path.read_text(encoding="utf-8")
    assert '"outputs": []' in text
    assert text.count('"outputs": []') == text.count('"outputs":')
    assert text.count('"execution_count": null') == text.count('"execution_count":')
