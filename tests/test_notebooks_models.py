"""The course on another model: a random-weight one in Stable Diffusion 1.x's layout, with CLIP's kind of tokenizer, in place of tabletop.

Nothing in a notebook may lean on tabletop's sizes, vocabulary, token positions or scheduler. The model's pictures mean nothing, so
what is held here is that every cell runs; that numbers are right is asserted in the cells themselves. Exercises are left unwritten.
"""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import families

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = [p for p in sorted((ROOT / "notebooks").glob("*.ipynb")) if p.stem[:2] in tuple(f"{n:02}" for n in range(10))]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return families.write("sd15", tmp_path_factory.mktemp("other") / "sd15")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_runs_on_a_model_of_another_kind(path, model, monkeypatch):
    monkeypatch.setenv("LABKIT_MODEL", str(model))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}})
    client.execute()
    said = "\n".join(o.get("text", "") + str(o.get("data", {}).get("text/markdown", "")) for cell in notebook.cells for o in cell.get("outputs", []))
    assert said.count("Yours to write") == sum("\ncheck." in cell.source for cell in notebook.cells)
