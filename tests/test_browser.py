"""The lab as its users meet it, in a real browser: exported pages under the pointer and the keyboard, and JupyterLab from
run all to a slider that changes a picture and a word that shows its heat map.

Needs Chromium and playwright (`LABKIT_EXTRAS=browser python start.py test`) and skips, saying so, without them;
LABKIT_REQUIRE_BROWSER=1 turns the skip into a failure. The browser is given no network but this machine.
"""

import contextlib
import json
import os
import re
import runpy
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
import torch
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from PIL import Image
from tiny import build

from labkit.probes.heatmap import HeatMap
from labkit.probes.record import record
from labkit.widgets import before_after, explore

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "a red ball left of blue cube"
PATIENCE = float(os.environ.get("LABKIT_BROWSER_TIMEOUT", "300"))  # seconds for each wait; a busy machine is slow

# What the first notebook does with its slider, without a model in between.
SMALL = """\
from PIL import Image
from labkit.probes.sweep import Sweep
from labkit.widgets import guidance_slider

scales = (0.0, 1.0, 3.0, 7.5, 12.0)
guidance_slider(Sweep([[Image.new("RGB", (32, 32), (int(20 * w), 80, 80)) for w in scales]], scales, (0,), "a red sphere"))
"""


SETTINGS = {
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false"},  # else it asks whether it may
    # JupyterLab keeps cells out of the page while they are out of sight; here all of them are to be seen
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},
}


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
def jupyterlab(folder: Path, state: Path, settings: dict | None = None):
    """A JupyterLab on `folder`, its settings under `state`, `settings` among them; gives a function from a path to its address there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    env = os.environ | {f"JUPYTER_{name}_DIR": str(state / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    env |= {f"JUPYTERLAB_{name}_DIR": str(state / name.lower()) for name in ("SETTINGS", "WORKSPACES")}
    env |= {"JUPYTER_PREFER_ENV_PATH": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    for plugin, values in (SETTINGS | (settings or {})).items():
        path = state / "settings" / plugin.split(":")[0] / f"{plugin.split(':')[1]}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
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
    assert "[ ]:" not in [count.strip() for count in counts(page)], "the run ended before the last cell"


class Shown(list):
    """What canvases show, sampled; equal where no sample differs by more than rounding does: browsers draw now on the GPU, now beside it."""

    def __eq__(self, other):
        return len(self) == len(other) and all(abs(a - b) <= 4 for mine, yours in zip(self, other) for a, b in zip(mine, yours, strict=True))

    def __ne__(self, other):
        return not self == other


def drawn(locator) -> Shown:
    """What the canvases of a page or a part of it show: colours at 32x32 places of each."""
    sample = """c => { const d = c.getContext("2d").getImageData(0, 0, c.width, c.height).data, out = [];
        for (let y = 0; y < 32; y++) for (let x = 0; x < 32; x++) {
            const i = 4 * (Math.floor((y + .5) * c.height / 32) * c.width + Math.floor((x + .5) * c.width / 32)); out.push(d[i], d[i + 1], d[i + 2]); }
        return out; }"""
    return Shown(canvas.evaluate(sample) for canvas in locator.locator(".labkit-picture").all())


def failed_cells(page) -> list[str]:
    """The texts of the errors that cells ended with."""
    return page.locator('.jp-NotebookPanel [data-mime-type="application/vnd.jupyter.error"]').all_inner_texts()


def move_slider_and_watch(page):
    """Move the slider called guidance by one step with the keyboard and see that a picture changes."""
    widget = page.locator(".jp-NotebookPanel .labkit-view[data-ready]", has=page.locator(".labkit-slider", has_text="guidance")).first
    widget.wait_for(timeout=PATIENCE * 1000)
    slider, value = widget.locator("input[type=range]").first, widget.locator("output").first
    slider.scroll_into_view_if_needed()
    before, said = drawn(widget), value.inner_text()
    assert before
    slider.focus()
    at_its_end = slider.input_value() == slider.get_attribute("max")
    slider.press("ArrowLeft" if at_its_end else "ArrowRight")
    wait_for(lambda: value.inner_text() != said, "the slider to move")
    wait_for(lambda: drawn(widget) != before, "the picture to change")
    wait_for(lambda: idle(page), "the kernel to finish")


def point_at_a_word_and_watch(page):
    """Move the pointer to a word of the explorer and see its heat map, and to the picture and see the shares change."""
    widget = page.locator(".jp-NotebookPanel .labkit-view[data-ready]", has=page.locator(".labkit-word")).first
    widget.wait_for(timeout=PATIENCE * 1000)
    words = widget.locator(".labkit-word")
    words.first.scroll_into_view_if_needed()
    plain, shares = drawn(widget), widget.locator(".labkit-share").all_inner_texts()
    assert plain and words.count() > 3
    words.nth(1).hover()
    wait_for(lambda: drawn(widget) != plain, "the heat map to show", 10)
    first = drawn(widget)
    words.nth(2).hover()
    wait_for(lambda: drawn(widget) not in (plain, first), "another word's map", 10)
    picture = widget.locator(".labkit-picture").first
    picture.scroll_into_view_if_needed()
    picture.hover()
    wait_for(lambda: widget.locator(".labkit-share").all_inner_texts() != shares, "the words that a place listens to", 10)


def strangers(page) -> list[str]:
    """A list of the addresses that the page will have asked of another machine than this one."""
    asked = []
    page.on("request", lambda request: asked.append(request.url)
            if request.url.startswith(("http", "ws")) and "://127.0.0.1:" not in request.url else None)
    return asked


def walk(browser, notebook: Path, state: Path, screenshot: Path, act=move_slider_and_watch):
    """The whole way through one notebook, then `act` on its page; nothing may be asked of the network, no cell may fail."""
    with jupyterlab(notebook.parent, state) as address:
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        asked = strangers(page)
        try:
            page.goto(address("lab/tree/" + notebook.name), timeout=PATIENCE * 1000)
            run_all(page, address)
            assert failed_cells(page) == []
            act(page)
        finally:  # what was on the screen tells most of a failure
            screenshot.parent.mkdir(exist_ok=True)
            page.screenshot(path=screenshot)
        page.close()
        assert asked == []


def test_a_presented_notebook_has_large_letters_and_one_document(browser, tmp_path):
    """What start.py --present asks of JupyterLab is done by it, not only known to it."""
    settings = runpy.run_path(str(ROOT / "start.py"))["PROJECTOR"]
    sizes = settings["@jupyterlab/apputils-extension:themes"]["overrides"]
    folder = tmp_path / "class"
    folder.mkdir()
    nbformat.write(new_notebook(cells=[new_markdown_cell("One sentence."), new_code_cell("1 + 1")]), folder / "small.ipynb")
    with jupyterlab(folder, tmp_path / "state", settings) as address:
        page = browser.new_page(viewport={"width": 1920, "height": 1080})
        page.goto(address("doc/tree/small.ipynb"), timeout=PATIENCE * 1000)
        code, text = page.locator(".jp-CodeCell .cm-content").first, page.locator(".jp-RenderedMarkdown p").first
        for cell, size in ((code, sizes["code-font-size"]), (text, sizes["content-font-size1"])):
            cell.wait_for(timeout=PATIENCE * 1000)
            wait_for(lambda: cell.evaluate("e => getComputedStyle(e).fontSize") == size, f"letters of {size}")
        assert page.locator(".jp-LabShell[data-shell-mode='single-document']").count() == 1
        page.close()


@pytest.fixture
def explorer(browser, tmp_path):
    """Opens the explorer of a tiny model's picture as an exported page; gives it with what it must show."""
    with record(build(), latents=True) as trace:
        trace.lab.generate(PROMPT, seed=0, progress=False)
    path = explore(trace).save(tmp_path / "explorer.html")
    page = browser.new_page(viewport={"width": 1920, "height": 1080})
    asked, errors = strangers(page), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(path.as_uri())
    page.locator("[data-ready]").wait_for(timeout=PATIENCE * 1000)
    yield page, trace
    assert asked == [] and errors == []
    page.close()


def word(page, text: str):
    return page.locator(".labkit-word", has=page.locator(f"b:text-is('{text}')")).first


def said(page) -> list[float]:
    """The shares that stand on the words, from 0 to 1."""
    return [float(text.rstrip(" %")) / 100 for text in page.locator(".labkit-share").all_inner_texts()]


def point(page, x: float, y: float):
    """Move the pointer over the picture, to x and y from 0 to 1."""
    box = page.locator(".labkit-picture").bounding_box()
    page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])


def slider(page, name: str):
    return page.locator(".labkit-slider", has_text=name).locator("input")


def test_pointing_at_a_word_shows_its_heat_map(explorer):
    page, _ = explorer
    plain = drawn(page)
    word(page, "ball").hover()
    ball = drawn(page)
    assert ball != plain and page.locator(".labkit-scale").is_visible()
    word(page, "cube").hover()
    assert drawn(page) not in (plain, ball), "two words have one map"
    page.mouse.move(5, 5)
    assert drawn(page) == plain, "the map stayed when the pointer left"
    word(page, "ball").click()
    page.mouse.move(5, 5)
    assert drawn(page) == ball and word(page, "ball").get_attribute("aria-pressed") == "true", "a click did not keep the word"
    page.get_by_role("button", name="one scale").click()
    assert drawn(page) != ball, "the word's own scale looks like the shared one"


def test_the_map_lies_over_the_picture_the_right_way_up(explorer):
    """Over a black picture the lightness is the map's alone, and magma's rises with the share."""
    page, trace = explorer
    page.set_content(explore(trace, Image.new("RGB", (16, 16))).to_html())
    page.locator("[data-ready]").wait_for(timeout=PATIENCE * 1000)
    page.get_by_role("button", name="one scale").click()
    for text in ("ball", "cube", "red"):
        m = trace.heatmap(text, layers="*").map  # (8, 8)
        word(page, text).hover()
        (canvas,) = drawn(page)
        lightness = torch.tensor(canvas).view(32, 32, 3).sum(-1)[2::4, 2::4]  # near the middle of each place
        ranks = [x.flatten().argsort().argsort().float() for x in (lightness, m)]
        assert torch.corrcoef(torch.stack(ranks))[0, 1] > 0.95, f"{text}: bright is not where the map is high"


def test_pointing_at_a_place_says_which_words_it_listens_to(explorer):
    page, trace = explorer
    everywhere, n = said(page), len(PROMPT.split())
    probs = {text: trace.heatmap(text, layers="*").map for text in ("ball", "cube")}
    seen = []
    for y, x in ((1, 6), (5, 2)):
        point(page, (x + 0.5) / 8, (y + 0.5) / 8)
        seen.append(said(page))
        for text, m in probs.items():
            assert abs(seen[-1][PROMPT.split().index(text)] - float(m[y, x])) < 0.006, (text, y, x)
        assert abs(sum(seen[-1]) - 1) < 0.03, "the shares of a place are not all there"
        best = page.locator(".labkit-best b").first.inner_text()
        assert seen[-1][PROMPT.split().index(best)] == max(seen[-1][:n]), "not the word that this place listens to most"
        assert "This place listens to" in page.locator(".labkit-readout").inner_text()
    assert seen[0] != seen[1] and everywhere not in seen
    page.mouse.move(5, 5)
    assert said(page) == everywhere


def test_sliders_change_the_map_and_playing_changes_the_picture(explorer):
    page, trace = explorer
    plain = drawn(page)
    slider(page, "layer").fill("1")
    means = trace.attention("red", trace.layers()[0])  # axes head, y, x
    assert abs(said(page)[1] - float(means.values.mean())) < 0.006, "the first layer's share of the word “red”"
    slider(page, "head").fill("2")
    assert abs(said(page)[1] - float(means.at(head=1).values.mean())) < 0.006
    assert drawn(page) == plain
    slider(page, "picture at").fill("1")
    assert drawn(page) != plain, "the first step looks like the last"
    page.get_by_role("button", name="play").click()
    last = slider(page, "picture at").get_attribute("max")
    wait_for(lambda: slider(page, "picture at").input_value() == last, "the trajectory to be played")
    wait_for(lambda: page.get_by_role("button", name="play").inner_text() == "▶ play", "the button to say that it has stopped")


def test_all_of_it_can_be_done_with_the_keyboard(explorer):
    page, _ = explorer
    plain, everywhere = drawn(page), said(page)
    page.locator(".labkit-picture").focus()
    page.keyboard.press("ArrowRight")
    first = said(page)
    page.keyboard.press("ArrowDown")
    assert first != everywhere and said(page) not in (first, everywhere)
    page.keyboard.press("Escape")
    assert said(page) == everywhere and drawn(page) == plain
    page.keyboard.press("Tab")  # from the picture to the first word
    a = drawn(page)
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.querySelector('b').textContent") == PROMPT.split()[1]
    assert drawn(page) not in (plain, a), "a focused word shows no map"
    assert page.locator(".labkit-picture").get_attribute("aria-label").startswith("The picture of “a red ball")
    slider(page, "layer").focus()
    page.keyboard.press("ArrowRight")
    assert slider(page, "layer").get_attribute("aria-valuetext").startswith("down")


@pytest.mark.parametrize("scheme, dark", [("light", False), ("dark", True)])
def test_the_page_is_light_or_dark_as_the_system_is(explorer, scheme, dark):
    page, _ = explorer
    page.emulate_media(color_scheme=scheme)
    colours = page.locator(".labkit-view").evaluate("e => [getComputedStyle(e).color, getComputedStyle(e).backgroundColor]")
    text, ground = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours)
    assert (text > ground) == dark and abs(text - ground) > 500
    page.evaluate("document.body.setAttribute('data-jp-theme-light', 'true')")
    assert page.locator(".labkit-view").evaluate("e => getComputedStyle(e).backgroundColor") == "rgb(255, 255, 255)", "JupyterLab's theme is not followed"


def test_an_edit_lights_up_the_same_word_on_both_sides(browser):
    maps = [[HeatMap(text, torch.rand(8, 8), "one step") for text in texts] for texts in (("red", "ball"), ("red", "cube"))]
    pictures = [Image.new("RGB", (16, 16), (0, 0, blue)) for blue in (80, 200)]
    page = browser.new_page()
    page.set_content(before_after(*pictures, *maps).to_html())
    page.locator("[data-ready]").wait_for(timeout=PATIENCE * 1000)
    plain = drawn(page)
    word(page, "red").hover()
    both = drawn(page)
    assert [Shown([a]) == [b] for a, b in zip(both, plain)] == [False, False, True]
    word(page, "cube").hover()
    one = drawn(page)
    assert [Shown([a]) == [b] for a, b in zip(one, plain)] == [True, False, True]
    page.close()


def test_a_slider_changes_a_picture(browser, tmp_path):
    """The machinery itself, on a notebook of one cell."""
    notebook = tmp_path / "a folder" / "small.ipynb"
    notebook.parent.mkdir()
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(new_notebook(cells=[new_code_cell(SMALL)], metadata={"kernelspec": kernel}), notebook)
    (tmp_path / "state").mkdir()
    walk(browser, notebook, tmp_path / "state", tmp_path / "small.png")


@pytest.mark.parametrize(
    "name, act", [("00_an_image_in_five_lines", move_slider_and_watch), ("08_attention_maps", point_at_a_word_and_watch)])
def test_a_shipped_notebook_runs_and_answers(browser, tmp_path, name, act):
    """On a copy, so that the saved notebook stays as it is; the package is found as installed."""
    copy = tmp_path / "notebooks" / f"{name}.ipynb"
    shutil.copytree(ROOT / "notebooks", copy.parent, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    (tmp_path / "state").mkdir()
    walk(browser, copy, tmp_path / "state", ROOT / "out" / f"browser_{name[:2]}.png", act)
