"""What running a notebook does not show: that it is saved whole, in order, clean, portable and described in words.

nbval (see pyproject.toml) runs every notebook and fails on an exception. It compares no pictures and no widgets, and
passes a notebook that was never run; so the saved file is looked at here. A picture must carry alternative text,
`display(figure, metadata={"image/png": {"alt": "..."}})`: screen readers and the HTML page use it.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p for p in (ROOT / "notebooks").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
MOST_BYTES = 1_000_000
IMAGES = ("image/png", "image/jpeg", "image/svg+xml")
# Home, temporary and drive paths; not "https://..." and not the "/" of a fraction.
ABSOLUTE = re.compile(r"(?<![\w./:])/(?:home|Users|root|tmp|work|mnt|opt|usr|var|private|content)/[\w.-]+"
                      r"|\b[A-Za-z]:\\\\?(?:Users|[\w.-]+\\)|file://")


def texts(cell) -> list[str]:
    """Everything in a cell that is written in words: source, and outputs other than pictures."""
    found = [cell.source]
    for output in cell.get("outputs", []):
        found.append(output.get("text", ""))
        found += [str(v) for k, v in output.get("data", {}).items() if not k.startswith("image/")]
        found += output.get("traceback", [])
    return found


def faults(path: Path) -> list[str]:
    """Everything wrong with a saved notebook, a sentence each; empty if it may be committed."""
    wrong = []
    if path.stat().st_size >= MOST_BYTES:
        wrong.append(f"takes {path.stat().st_size:,} bytes: save smaller pictures (the limit is {MOST_BYTES:,})")
    try:
        notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
        nbformat.validate(notebook)
    except (nbformat.ValidationError, nbformat.reader.NotJSONError, AttributeError) as error:
        return [*wrong, f"is not a valid notebook: {str(error).splitlines()[0]}"]
    if notebook.nbformat != 4:
        return [*wrong, f"has the old notebook format {notebook.nbformat}"]

    kernel = notebook.metadata.get("kernelspec", {}).get("name")
    if kernel != "python3":
        wrong.append(f"wants the kernel {kernel!r}, others have only 'python3'")
    if "widgets" in notebook.metadata:
        wrong.append("holds saved widget state: it is drawn nowhere without its kernel, save without it")

    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        wrong.append(f"was not run top to bottom: its counts are {[cell.execution_count for cell in code]}")
    for number, cell in enumerate(notebook.cells):
        for match in ABSOLUTE.finditer("\n".join(texts(cell))):
            wrong.append(f"cell {number} has the absolute path {match.group()!r}")
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                wrong.append(f"cell {number} ended with {output.ename}")
            for kind in IMAGES:
                if kind in output.get("data", {}):
                    alt = output.metadata.get(kind, {}).get("alt") or cell.metadata.get("alt") or ""
                    if len(alt.split()) < 3:
                        wrong.append(f"cell {number} has a picture without alternative text")
    return wrong


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_saved_notebook_may_be_committed(path):
    assert faults(path) == []


# ---- tests of the test -------------------------------------------------------------------------------------------


def sound():
    """A notebook of two cells, run, with a picture that is described."""
    picture = new_output("display_data", data={"image/png": "iVBORw0KGgo=", "text/plain": "<Figure>"},
                         metadata={"image/png": {"alt": "a red sphere on a table"}})
    return new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
        cells=[new_code_cell("a = 1 / 2  # see https://example.org/home/page", execution_count=1),
               new_code_cell("assert a == 0.5", execution_count=2, outputs=[picture])])


def saved(folder: Path, notebook) -> Path:
    path = folder / "copy.ipynb"
    nbformat.write(notebook, path)
    return path


def test_a_sound_notebook_passes(tmp_path):
    assert faults(saved(tmp_path, sound())) == []


def no_alt(notebook):
    notebook.cells[1].outputs[0].metadata = {}


def other_kernel(notebook):
    notebook.metadata.kernelspec.name = "my-venv"


def never_run(notebook):
    notebook.cells[0].execution_count = notebook.cells[1].execution_count = None


def run_out_of_order(notebook):
    notebook.cells[0].execution_count, notebook.cells[1].execution_count = 2, 1


def run_twice(notebook):
    notebook.cells[1].execution_count = 3


def failed(notebook):
    notebook.cells[0].outputs = [new_output("error", ename="ValueError", evalue="no", traceback=["no"])]


def path_in_source(notebook):
    notebook.cells[0].source = "open('/home/me/model')"


def path_in_output(notebook):
    notebook.cells[0].outputs = [new_output("stream", text="saved to C:\\Users\\me\\x.png\n")]


def widget_state(notebook):
    notebook.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": {"state": {}}}


def too_big(notebook):
    notebook.cells[1].outputs[0].data["image/png"] = "A" * MOST_BYTES


@pytest.mark.parametrize("spoil, said", [
    (no_alt, "cell 1 has a picture without alternative text"),
    (other_kernel, "wants the kernel 'my-venv'"),
    (never_run, "was not run top to bottom"),
    (run_out_of_order, "was not run top to bottom"),
    (run_twice, "was not run top to bottom"),
    (failed, "cell 0 ended with ValueError"),
    (path_in_source, "cell 0 has the absolute path '/home/me'"),
    (path_in_output, "cell 0 has the absolute path"),
    (widget_state, "holds saved widget state"),
    (too_big, "takes 1,0"),
])
def test_a_spoilt_notebook_is_reported(tmp_path, spoil, said):
    notebook = sound()
    spoil(notebook)
    found = faults(saved(tmp_path, notebook))
    assert len(found) == 1 and found[0].startswith(said), found


@pytest.mark.parametrize("text", ["", "{", "[]", '{"cells": []}', "version https://git-lfs.github.com/spec/v1"])
def test_a_file_that_is_no_notebook_is_reported(tmp_path, text):
    path = tmp_path / "copy.ipynb"
    path.write_text(text, encoding="utf-8")
    assert faults(path) != []


def test_a_broken_cell_turns_the_run_red(tmp_path):
    """nbval runs the cells, with the options of pyproject.toml: one good cell passes, one broken cell fails."""
    notebook = sound()
    notebook.cells[1].source = "assert a == 2"
    path = saved(tmp_path, notebook)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"),
               "--rootdir", str(tmp_path), str(path)]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
