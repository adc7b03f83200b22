"""The lab as its users meet it: JupyterLab in a real browser, run all, move the slider, see the picture change.

Needs Chromium and playwright (`LABKIT_EXTRAS=browser python start.py test`) and skips, saying so, without them;
LABKIT_REQUIRE_BROWSER=1 turns the skip into a failure. The browser is given no network but this machine.
"""

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "notebooks" / "00_an_image_in_five_lines.ipynb"
PATIENCE = float(os.environ.get("LABKIT_BROWSER_TIMEOUT", "300"))  # seconds for each wait; a busy machine is slow

# A slider, and a picture that is its value: what the first notebook does, without a network in between.
SMALL = """\
import io
import ipywidgets as w
from PIL import Image

slider = w.SelectionSlider(options=[0, 1, 3, 7.5, 12], value=1, description="guidance")
picture = w.Image(format="png")

def draw(_=None):
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (int(20 * slider.value), 80, 80)).save(buffer, "png")
    picture.value = buffer.getvalue()

slider.observe(draw, names=["value"])
draw()
w.VBox([slider, picture])
"""


def missing(what: str):
    """Skip for want of `what`, or fail where a browser is required."""
    if os.environ.get("LABKIT_REQUIRE_BROWSER") == "1":
        pytest.fail(what)
    pytest.skip(what)


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium that can reach this machine only."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("playwright is not installed: LABKIT_EXTRAS=browser python start.py test")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    path = os.environ.get("LABKIT_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if path is None:
        missing("no Chromium found: install it, or name it in LABKIT_CHROMIUM")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=path, timeout=PATIENCE * 1000,
            args=["--no-sandbox", "--disable-dev-shm-usage",
                  "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"])
        yield chromium
        chromium.close()


@contextlib.contextmanager
def jupyterlab(folder: Path, state: Path):
    """A JupyterLab on `folder`, its settings under `state`; gives a function from a path to its address there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    env = os.environ | {f"JUPYTER_{name}_DIR": str(state / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    env |= {f"JUPYTERLAB_{name}_DIR": str(state / name.lower()) for name in ("SETTINGS", "WORKSPACES")}
    env |= {"JUPYTER_PREFER_ENV_PATH": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    news = state / "settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    news.parent.mkdir(parents=True)
    # JupyterLab keeps cells out of the page while they are out of sight; here all of them are to be seen
    cells = state / "settings" / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
    cells.parent.mkdir(parents=True)
    cells.write_text(json.dumps({"windowingMode": "none"}))
    news.write_text('{"fetchNews": "false"}')  # else it asks whether it may
    log = state / "server.log"
    with log.open("wb") as sink:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1",
             f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}",
             f"--ServerApp.root_dir={folder}"],
            env=env, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT)
    try:
        def address(path: str) -> str:
            return f"http://127.0.0.1:{port}/{path}?token={token}"

        end = time.monotonic() + PATIENCE
        while True:
            try:
                urllib.request.urlopen(address("api"), timeout=5).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < end, log.read_text(errors="replace")
                time.sleep(0.3)
        yield address
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()


def wait_for(condition, what: str, patience: float = PATIENCE):
    """Poll until `condition()` is true; gives its value."""
    end = time.monotonic() + patience
    while not (value := condition()):
        assert time.monotonic() < end, f"waited {patience:.0f} s for {what}"
        time.sleep(0.2)
    return value


def idle(page) -> bool:
    return page.locator('.jp-NotebookPanel .jp-Notebook-ExecutionIndicator[data-status="idle"]').count() > 0


def counts(page) -> list[str]:
    """The prompts of the code cells: "[ ]:" before, "[*]:" while, "[3]:" after they ran."""
    return page.locator(".jp-NotebookPanel .jp-CodeCell .jp-InputPrompt").all_inner_texts()


def kernel_is_ready(address) -> bool:
    """True once the server has a kernel for the notebook and the page is connected to it."""
    with urllib.request.urlopen(address("api/sessions"), timeout=60) as answer:
        kernels = [session["kernel"] for session in json.load(answer)]
    return any(k["execution_state"] == "idle" and k["connections"] > 0 for k in kernels)


def run_all(page, address):
    """Run > Run All Cells once the kernel is there, and wait until the last cell has run."""
    page.locator(".jp-NotebookPanel .jp-Cell").first.wait_for(timeout=PATIENCE * 1000)
    # The page calls a notebook idle before it has a kernel; who runs it then is asked to choose one.
    wait_for(lambda: kernel_is_ready(address) and idle(page), "the kernel to start")
    before = counts(page)
    for attempt in range(2):  # a click that comes before the menu is ready is lost
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_text("Run All Cells", exact=True).click()
        with contextlib.suppress(AssertionError):
            wait_for(lambda: counts(page) != before, "the run to start", PATIENCE if attempt else 20)
            break
    wait_for(lambda: idle(page) and not any("*" in count for count in counts(page)), "all cells to run")


def pictures(page) -> list[str]:
    """The sources of the pictures that the notebook's widgets show; of those they hide, none."""
    images = page.locator(".jp-NotebookPanel img.widget-image").all()
    return [image.get_attribute("src") for image in images if image.is_visible()]


def failed_cells(page) -> list[str]:
    """The texts of the errors that cells ended with."""
    return page.locator('.jp-NotebookPanel [data-mime-type="application/vnd.jupyter.error"]').all_inner_texts()


def move_slider_and_watch(page):
    """Move the slider called guidance by one step with the keyboard and see that a picture changes."""
    slider = page.locator(".jp-NotebookPanel .widget-hslider", has_text="uidance").first
    slider.wait_for(timeout=PATIENCE * 1000)
    slider.scroll_into_view_if_needed()
    handle = slider.locator(".noUi-handle")
    before = wait_for(lambda: pictures(page), "a picture under the slider")
    value = slider.locator(".widget-readout").inner_text()
    handle.focus()
    at_its_end = handle.get_attribute("aria-valuenow") == handle.get_attribute("aria-valuemax")
    handle.press("ArrowLeft" if at_its_end else "ArrowRight")
    wait_for(lambda: slider.locator(".widget-readout").inner_text() != value, "the slider to move")
    wait_for(lambda: pictures(page) != before, "the picture to change")
    wait_for(lambda: idle(page), "the kernel to finish")


def walk(browser, notebook: Path, state: Path, screenshot: Path):
    """The whole way through one notebook; nothing may be asked of the network, no cell may fail."""
    with jupyterlab(notebook.parent, state) as address:
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        strangers = []
        page.on("request", lambda request: strangers.append(request.url)
                if request.url.startswith(("http", "ws")) and "://127.0.0.1:" not in request.url else None)
        try:
            page.goto(address("lab/tree/" + notebook.name), timeout=PATIENCE * 1000)
            run_all(page, address)
            assert failed_cells(page) == []
            move_slider_and_watch(page)
        finally:  # what was on the screen tells most of a failure
            screenshot.parent.mkdir(exist_ok=True)
            page.screenshot(path=screenshot)
        page.close()
        assert strangers == []


def test_a_slider_changes_a_picture(browser, tmp_path):
    """The machinery itself, on a notebook of one cell."""
    notebook = tmp_path / "a folder" / "small.ipynb"
    notebook.parent.mkdir()
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(new_notebook(cells=[new_code_cell(SMALL)], metadata={"kernelspec": kernel}), notebook)
    (tmp_path / "state").mkdir()
    walk(browser, notebook, tmp_path / "state", tmp_path / "small.png")


@pytest.mark.skipif(not NOTEBOOK.exists(), reason="the notebook is not there")
def test_the_first_notebook_runs_and_its_slider_changes_the_picture(browser, tmp_path):
    """On a copy, so that the saved notebook stays as it is; the package is found as installed."""
    copy = tmp_path / "notebooks" / NOTEBOOK.name
    shutil.copytree(NOTEBOOK.parent, copy.parent, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    (tmp_path / "state").mkdir()
    walk(browser, copy, tmp_path / "state", ROOT / "out" / "browser_00.png")
