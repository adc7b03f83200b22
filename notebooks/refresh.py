"""Run notebooks from top to bottom and save them as they may be committed.

    python notebooks/refresh.py                    all of them, with the Python of the lab's environment
    python notebooks/refresh.py 00_an_image...     those named

A widget lives as long as its kernel: in a saved file its place would show an error, so its view is taken out and the
words that stand for it stay. So do the pictures, as JPEG where that is smaller; times and versions of this machine do not.
"""

import base64
import sys
from io import BytesIO
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

HERE = Path(__file__).resolve().parent
WIDGET = "application/vnd.jupyter.widget-view+json"


def refresh(path: Path) -> None:
    """Run one notebook and save it; on an error nothing is saved."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=1800, kernel_name="python3", record_timing=False, store_widget_state=False, coalesce_streams=True,
        resources={"metadata": {"path": str(HERE)}},
    )  # fmt: skip
    client.execute()
    notebook.metadata.language_info = {"name": "python"}
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            output.get("data", {}).pop(WIDGET, None)
            shrink(output)
    nbformat.write(notebook, path)


def shrink(output) -> None:
    """Keep an output's PNG as JPEG where that takes fewer bytes, its description with it."""
    png = output.get("data", {}).get("image/png")
    if png is None:
        return
    image = Image.open(BytesIO(base64.b64decode(png))).convert("RGB")
    image.save(file := BytesIO(), "JPEG", quality=80, subsampling=0, optimize=True)
    jpeg = base64.b64encode(file.getvalue()).decode()
    if len(jpeg) < len(png):
        del output.data["image/png"]
        output.data["image/jpeg"] = jpeg
        if "image/png" in output.metadata:
            output.metadata["image/jpeg"] = output.metadata.pop("image/png")


if __name__ == "__main__":
    for path in sorted(map(Path, sys.argv[1:])) or sorted(HERE.glob("*.ipynb")):
        refresh(path)
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")
