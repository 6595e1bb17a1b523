"""The notebooks run from top to bottom, show what they say, and are stored without outputs."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"


def ran(name, monkeypatch, **environment):
    """The outputs of a notebook: text, pictures (uint8 arrays), and Markdown."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for key, value in environment.items():
        monkeypatch.setenv(key, str(value))
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    where = {"metadata": {"path": str(NOTEBOOKS)}}
    nbclient.NotebookClient(notebook, timeout=600, resources=where).execute()
    text, pictures, markdown = "", [], []
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            text += output.get("text", "")
            data = output.get("data", {})
            markdown += [data["text/markdown"]] if "text/markdown" in data else []
            if "image/png" in data:
                png = io.BytesIO(base64.b64decode(data["image/png"]))
                pictures.append(np.asarray(Image.open(png).convert("RGB")))
    return text, pictures, markdown


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_stored_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)


def test_figures(tmp_path, monkeypatch):
    text, pictures, (table,) = ran("figures", monkeypatch, DMOE_VAR_FIGURES=tmp_path)
    assert text.startswith("28 settings, 1000 images each, seeds [0, 1, 2]\n")
    assert len(pictures) == 4
    assert all(picture.std() > 10 for picture in pictures)
    stored = (NOTEBOOKS / "records" / "digits" / "table.md").read_text()
    assert table == stored.rstrip("\n")
    assert {path.name for path in tmp_path.iterdir()} == {
        "fid_over_flops.png",
        "experts_over_tau.png",
    }


def test_demo(monkeypatch):
    """A grid of the dense model, one for each tau, and the maps; less cost with every tau."""
    text, pictures, _ = ran("demo", monkeypatch)
    dense = float(re.search(r"dense: ([\d.]+) GMAC", text)[1])
    found = re.findall(r"tau ([\d.]+): ([\d.]+) GMAC", text)
    taus, costs = zip(*((float(tau), float(cost)) for tau, cost in found[:5]), strict=True)
    assert taus == (0, 0.1, 0.2, 0.3, 0.5)
    assert list(costs) == sorted(costs, reverse=True)
    assert costs[-1] < dense <= 1.1 * costs[0]
    assert len(pictures) >= 7
    assert all(picture.std() > 10 for picture in pictures)
    assert "Traceback" not in text
