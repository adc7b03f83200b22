"""The set-up: three lists of packages that agree, and a start.py that does the right thing from any state of .venv.

Nothing is installed here; pip and the virtual environment are replaced by stand-ins that leave files behind.
"""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONDA_NAMES = {"pytorch": "torch"}  # conda-forge's name -> the package index's


def asked_for(*extras: str) -> dict[str, SpecifierSet]:
    """What pyproject.toml asks for: name -> versions."""
    lines = PROJECT["dependencies"] + [r for extra in extras for r in PROJECT["optional-dependencies"][extra]]
    found = [Requirement(line) for line in lines]
    assert len({canonicalize_name(r.name) for r in found}) == len(found), "a package is listed twice"
    return {canonicalize_name(r.name): r.specifier for r in found}


def pins() -> dict[str, SpecifierSet]:
    """What constraints.txt pins: name -> "==version"."""
    lines = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
             if line and not line.startswith("#")]
    found = [Requirement(line) for line in lines]
    assert len({canonicalize_name(r.name) for r in found}) == len(found), "a package is pinned twice"
    return {canonicalize_name(r.name): r.specifier for r in found}


# ---- the lists ---------------------------------------------------------------------------------------------------


def test_environment_yml_asks_for_what_pyproject_asks_for():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert conda["name"] == "labkit"
    assert conda["channels"] == ["conda-forge", "nodefaults"]
    listed = {canonicalize_name(CONDA_NAMES.get(r.name, r.name)): r.specifier
              for r in (Requirement(line) for line in conda["dependencies"] if isinstance(line, str))}
    assert listed.pop("python") == SpecifierSet(PROJECT["requires-python"])
    listed.pop("pip")
    assert listed == asked_for("notebooks", "test")
    assert [line for line in conda["dependencies"] if not isinstance(line, str)] == [{"pip": ["-e ."]}]


def test_everything_asked_for_is_pinned_to_a_version_that_satisfies_it():
    pinned = pins()
    for name, versions in asked_for("notebooks", "test", "browser", "present").items():
        version = str(pinned[name]).removeprefix("==")
        assert versions.contains(version), f"{name} is pinned to {version}, pyproject.toml asks for {versions}"


def test_pins_are_exact_and_belong_to_no_machine():
    for name, specifier in pins().items():
        assert re.fullmatch(r"==[\w.]+", str(specifier)), f"{name}{specifier}"  # a "+cpu" would be one machine's
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert "://" not in text and " @ " not in text and "-e " not in text


def test_every_package_that_gets_installed_is_pinned():
    """Follows what is installed here from labkit down: a package without a pin differs from one day to the next."""
    from importlib.metadata import PackageNotFoundError, requires

    pinned, seen = pins(), set()
    todo = list(asked_for("notebooks", "test"))
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            lines = requires(name) or []
        except PackageNotFoundError:
            continue
        for requirement in map(Requirement, lines):
            if requirement.marker is None or requirement.marker.evaluate(default_environment() | {"extra": ""}):
                todo.append(canonicalize_name(requirement.name))
    # A CUDA build of torch brings its own packages, each pinned by torch itself. setuptools comes with Python.
    own = re.compile(r"nvidia-.*|cuda-.*|triton|setuptools|pip")
    missing = sorted(n for n in seen - set(pinned) if not own.fullmatch(n))
    assert missing == [], "pin these in constraints.txt"
    assert len(seen) > 80  # the walk did go down


# ---- start.py ----------------------------------------------------------------------------------------------------


@pytest.fixture
def start(tmp_path, monkeypatch):
    """start.py in a project folder with a space in its name; environment and pip are stand-ins that are logged."""
    folder = tmp_path / "my lab"
    folder.mkdir()
    for name in ("start.py", "constraints.txt", "pyproject.toml"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    for name in ("LABKIT_EXTRAS", "LABKIT_TORCH_INDEX"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("start_under_test", folder / "start.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.GIGABYTES = 0
    module.log = []
    module.pip_code = 0

    def step(arguments, problem):
        if "venv" in arguments:
            module.log.append("venv")
            python = Path(module.venv_python())
            python.parent.mkdir(parents=True)
            os.symlink(sys.executable, python)

    def install(extras, torch_index):
        assert os.path.exists(module.UNFINISHED)
        module.log.append(f"pip {','.join(extras)}" + (f" from {torch_index}" if torch_index else ""))
        if isinstance(module.pip_code, BaseException):
            raise module.pip_code
        return module.pip_code

    monkeypatch.setattr(module, "step", step)
    monkeypatch.setattr(module, "install", install)
    return module


needs_links = pytest.mark.skipif(os.name == "nt", reason="the stand-in for .venv is a link")


@needs_links
def test_first_run_installs_and_second_does_nothing(start):
    start.set_up()
    assert start.log == ["venv", "pip notebooks,test"]
    start.set_up()
    assert len(start.log) == 2


@needs_links
@pytest.mark.parametrize("name", ["constraints.txt", "pyproject.toml"])
def test_a_changed_list_is_installed_into_the_same_environment(start, name):
    start.set_up()
    with open(Path(start.ROOT) / name, "a") as file:
        file.write("# changed\n")
    start.set_up()
    assert start.log == ["venv", "pip notebooks,test", "pip notebooks,test"]


@needs_links
def test_line_ends_are_no_change(start):
    start.set_up()
    path = Path(start.ROOT) / "constraints.txt"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    start.set_up()
    assert len(start.log) == 2


@needs_links
def test_an_interrupted_set_up_is_begun_afresh(start, capsys):
    start.pip_code = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        start.set_up()
    start.pip_code = 0
    start.set_up()
    assert start.log == ["venv", "pip notebooks,test"] * 2
    assert "interrupted" in capsys.readouterr().out


@needs_links
def test_pip_that_was_killed_is_begun_afresh_and_pip_that_failed_is_repeated(start):
    for code, again in ((-9, ["venv", "pip notebooks,test"]), (1, ["pip notebooks,test"])):
        start.pip_code = code
        with pytest.raises(start.Stop, match="run again"):
            start.set_up()
        start.log.clear()
        start.pip_code = 0
        start.set_up()
        assert start.log == again
        os.remove(start.STAMP)


@needs_links
@pytest.mark.parametrize("content", ["", "{", "[]", '"x"', "{}"])
def test_a_broken_stamp_is_repaired(start, content):
    start.set_up()
    Path(start.STAMP).write_text(content)
    start.set_up()
    assert start.log == ["venv", "pip notebooks,test", "pip notebooks,test"]
    assert start.stamped()["extras"] == ["notebooks", "test"]


@needs_links
def test_an_environment_without_its_python_is_rebuilt(start, capsys):
    start.set_up()
    os.remove(start.venv_python())
    start.set_up()
    assert start.log.count("venv") == 2 and "does not start" in capsys.readouterr().out


@needs_links
def test_an_environment_of_another_python_is_rebuilt(start, capsys):
    start.set_up()
    python = Path(start.venv_python())
    python.unlink()
    python.write_text("#!/bin/sh\necho 3.10\n")
    python.chmod(0o755)
    os.remove(start.STAMP)
    start.set_up()
    assert start.log.count("venv") == 2 and "made by Python 3.10" in capsys.readouterr().out


@needs_links
def test_a_moved_project_is_rebuilt(start, tmp_path, capsys):
    start.set_up()
    stamp = Path(start.STAMP)
    stamp.write_text(stamp.read_text().replace("my lab", "old lab"))
    start.set_up()
    assert start.log.count("venv") == 2 and "moved" in capsys.readouterr().out


@needs_links
def test_extras_are_added_and_kept(start, monkeypatch):
    start.set_up()
    monkeypatch.setenv("LABKIT_EXTRAS", "browser")
    start.set_up()
    monkeypatch.delenv("LABKIT_EXTRAS")
    start.set_up()  # more than is wanted is there: nothing to do
    assert start.log == ["venv", "pip notebooks,test", "pip browser,notebooks,test"]


@needs_links
def test_another_torch_is_a_new_environment(start, monkeypatch):
    start.set_up()
    monkeypatch.setenv("LABKIT_TORCH_INDEX", "an-index")
    start.set_up()
    monkeypatch.delenv("LABKIT_TORCH_INDEX")
    start.set_up()
    assert start.log == ["venv", "pip notebooks,test", "venv", "pip notebooks,test from an-index"]


def test_it_never_removes_the_python_it_runs_with(start, monkeypatch):
    monkeypatch.setattr(start.sys, "prefix", start.VENV)
    with pytest.raises(start.Stop, match="your own Python"):
        start.remove_venv()


@pytest.mark.parametrize("version", [(2, 7), (3, 10), (3, 15), (4, 0)])
def test_another_python_gets_one_sentence(start, monkeypatch, version):
    monkeypatch.setattr(start.sys, "version_info", (*version, 0))
    with pytest.raises(start.Stop, match=r"this is Python .*the lab needs 3\.11 to 3\.14") as stop:
        start.check_python()
    assert "\n" not in str(stop.value)


def test_its_versions_are_those_of_pyproject(start):
    allowed = SpecifierSet(PROJECT["requires-python"])
    inside = [minor for minor in range(30) if allowed.contains(f"3.{minor}.0")]
    assert [start.OLDEST, start.NEWEST] == [(3, inside[0]), (3, inside[-1])]


def test_it_needs_nothing_but_an_old_python_to_be_read():
    """An old Python must get as far as the version check: old syntax, standard library only."""
    tree = ast.parse((ROOT / "start.py").read_text(encoding="utf-8"), feature_version=(3, 7))
    names = {alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import)
             for alias in node.names}
    assert names <= sys.stdlib_module_names and not [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]


@pytest.mark.parametrize("arguments", [["--hedless"], ["tests"], ["--headless", "x"], ["--present"],
                                       ["--present", "42"], ["--present", "../08"], ["--present", "08", "--viola"]])
def test_a_wrong_argument_ends_in_one_line_and_2(arguments):
    done = subprocess.run([sys.executable, str(ROOT / "start.py"), *arguments], capture_output=True, text=True,
                          timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("labkit: ") and len(done.stderr.splitlines()) == 1


def test_a_missing_notebook_is_one_line(start):
    for what in (start.open_lab, start.run_headless):
        with pytest.raises(start.Stop, match="is missing"):
            what()


def test_the_headless_page_keeps_what_pictures_show_in_words(start):
    from nbconvert import HTMLExporter
    from nbformat.v4 import new_code_cell, new_notebook, new_output

    picture = new_output("display_data", data={"image/png": "iVBORw0KGgo="},
                         metadata={"image/png": {"alt": "a red sphere"}})
    notebook = new_notebook(cells=[new_code_cell("1", outputs=[picture])])
    page, _ = HTMLExporter(template_name=start.TEMPLATE).from_notebook_node(notebook)
    assert 'alt="a red sphere"' in page and "data:image/png;base64,iVBORw0KGgo=" in page


def test_tests_run_without_the_hub_and_pass_on_their_arguments(start, monkeypatch):
    seen = {}
    monkeypatch.setattr(start, "foreground", lambda command, env: seen.update(command=command, env=env) or 0)
    assert start.run_tests(["-k", "two words"]) == 0
    assert seen["command"] == [start.venv_python(), "-m", "pytest", "-k", "two words"]
    assert seen["env"]["HF_HUB_OFFLINE"] == "1" and "PYTHONPATH" not in seen["env"]


def test_jupyterlab_stays_on_this_machine_and_keeps_its_token(start, monkeypatch):
    (Path(start.ROOT) / "notebooks").mkdir()
    Path(start.notebook_path()).touch()
    seen = []
    monkeypatch.setattr(start, "foreground", lambda command, env: seen.extend(command) or 0)
    assert start.open_lab() == 0
    assert "--ServerApp.ip=127.0.0.1" in seen and "--ServerApp.root_dir=" + start.ROOT in seen
    assert not [option for option in seen if "token" in option or "password" in option or "0.0.0.0" in option]


@pytest.fixture
def notebook(start):
    """One notebook with an output, in the project folder that `start` works in; gives its path."""
    from nbformat import write
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

    cells = [new_markdown_cell("[a file](../labkit/tap.py), [another](01_noise.ipynb)"),
             new_code_cell("1", execution_count=1, outputs=[new_output("stream", text="the answer")])]
    path = Path(start.ROOT) / "notebooks" / "08_attention_maps.ipynb"
    path.parent.mkdir()
    write(new_notebook(cells=cells), path)
    return path


@pytest.mark.parametrize("number", ["08", "8"])
def test_a_notebook_is_presented_from_a_copy_without_answers(start, notebook, monkeypatch, number):
    import nbformat

    before, seen = notebook.read_bytes(), []
    monkeypatch.setattr(start, "foreground", lambda command, env: seen.extend(command) or 0)
    assert start.present(number, as_page=False) == 0
    assert notebook.read_bytes() == before
    copy = nbformat.read(Path(start.ROOT) / "out" / notebook.name, as_version=4)
    nbformat.validate(copy)
    original = nbformat.read(notebook, as_version=4)
    assert copy.cells[0].source == "[a file](../labkit/tap.py), [another](../notebooks/01_noise.ipynb)"
    assert copy.cells[1].source == original.cells[1].source
    assert copy.cells[1].outputs == [] and copy.cells[1].execution_count is None and copy.cells[1].metadata.scrolled is False
    assert "--LabApp.default_url=/doc/tree/out/" + notebook.name in seen and "--ServerApp.ip=127.0.0.1" in seen
    folders = dict(option.removeprefix("--LabApp.").split("=") for option in seen if "_dir=" in option and "LabApp" in option)
    assert set(folders) == {"user_settings_dir", "workspaces_dir"}, "the presenter's own JupyterLab is touched"
    assert all(Path(folder).is_relative_to(start.ROOT) for folder in folders.values())
    written = {plugin: Path(folders["user_settings_dir"], *plugin.split(":")).with_suffix(".jupyterlab-settings") for plugin in start.PROJECTOR}
    assert {plugin: json.loads(path.read_text()) for plugin, path in written.items()} == start.PROJECTOR


def test_the_projectors_settings_are_settings_of_this_jupyterlab(start):
    """A setting that JupyterLab does not know is dropped without a word."""
    schemas = Path(sys.prefix) / "share" / "jupyter" / "lab" / "schemas"
    for plugin, values in start.PROJECTOR.items():
        package, name = plugin.split(":")
        known = json.loads((schemas / package / (name + ".json")).read_text(encoding="utf-8"))["properties"]
        assert set(values) <= set(known), plugin
        if "overrides" in values:
            assert set(values["overrides"]) <= set(known["overrides"]["default"])


def test_an_unknown_notebook_is_answered_with_those_there_are(start, notebook):
    with pytest.raises(start.Stop, match="no notebook '11'.*08_attention_maps"):
        start.present("11", as_page=False)
    assert not (Path(start.ROOT) / "out").exists()


def test_the_page_without_code_brings_its_own_extra(start, notebook, monkeypatch):
    asked, seen = [], []
    monkeypatch.setattr(start, "set_up", lambda further=(): asked.append(set(further)))
    monkeypatch.setattr(start, "foreground", lambda command, env: seen.append(command) or 0)
    assert start.main(["--present", "08"]) == 0 and start.main(["--present", "08", "--voila"]) == 0
    assert asked == [set(), {"present"}]
    assert [command[2] for command in seen] == ["jupyterlab", "voila"]
    assert str(Path(start.ROOT) / "out" / notebook.name) in seen[1] and "--Voila.ip=127.0.0.1" in seen[1]


def test_the_page_without_code_runs_the_notebook(start, notebook, tmp_path):
    """Voila as `start.py --present NN --voila` starts it, where it is installed: the page holds what the cells drew, and no code."""
    import socket
    import time
    import urllib.error
    import urllib.request

    import nbformat

    if importlib.util.find_spec("voila") is None:
        pytest.skip("Voila is not installed: LABKIT_EXTRAS=present python start.py test")
    cells = [nbformat.v4.new_code_cell("import ipywidgets\nprint(6 * 7)\nipywidgets.IntSlider(3, description='steps')")]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), notebook)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path / "voila.log"
    command = [sys.executable, *start.voila(str(notebook)), f"--port={port}", "--no-browser"]
    with log.open("wb") as sink:
        server = subprocess.Popen(command, cwd=notebook.parent, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT)
    try:
        end, page = time.monotonic() + 180, None
        while page is None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=180) as answer:
                    page = answer.read().decode()
            except ConnectionError:
                pass
            except urllib.error.URLError as error:
                assert isinstance(error.reason, ConnectionError), error
            assert server.poll() is None and time.monotonic() < end, log.read_text(errors="replace")
            time.sleep(0.2)
    finally:
        server.terminate()
        server.wait(30)
    assert "<pre>42" in page.replace("\n", ""), log.read_text(errors="replace")
    # the slider's state stays in the kernel, from where the page fetches it
    assert page.count("application/vnd.jupyter.widget-view+json") == 1, "the slider is not in the page"
    assert "6 * 7" not in page, "the page shows the code"
