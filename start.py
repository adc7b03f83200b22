"""Set the lab up and open it: the one file to run, with any Python from 3.11 on and nothing else installed.

    python start.py                 set up what is missing, then open JupyterLab on the first notebook
    python start.py test [args]     the same set-up, then all tests and notebooks (args go to pytest)
    python start.py --headless      the same set-up, then run the first notebook into out/, no browser
    python start.py --present 08    the same set-up, then notebook 08 for a projector: a fresh copy in out/, large letters
    python start.py --present 08 --voila    the same notebook as a page without code, run at once (installs Voila)

Everything lives in .venv beside this file; delete that folder to start afresh. A stamp in it holds a hash of what
was asked for (constraints.txt, pyproject.toml, this Python, this folder), so a second run installs nothing and
needs no network.

    LABKIT_TORCH_INDEX   a further package index to take torch from, say one with builds for your GPU or for CPUs only
    LABKIT_EXTRAS        further extras of pyproject.toml to install, such as "browser" (for the browser test)
"""
# Kept to the syntax of Python 3.6, so that an old Python gets a sentence and not a SyntaxError.
import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys

ROOT = os.path.dirname(os.path.realpath(__file__))
VENV = os.path.join(ROOT, ".venv")
STAMP = os.path.join(VENV, "labkit-stamp.json")
UNFINISHED = os.path.join(VENV, "labkit-unfinished")
NOTEBOOK = "00_an_image_in_five_lines"
TEMPLATE = "classic"  # nbconvert's newer "lab" page drops the alternative texts of pictures
OLDEST, NEWEST = (3, 11), (3, 14)
EXTRAS = {"notebooks", "test"}
PROJECTOR = {  # JupyterLab's settings for --present: legible from the last row, nothing cut off at the right
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false"},
    "@jupyterlab/apputils-extension:themes": {
        "theme": "JupyterLab Light",
        "overrides": {"code-font-size": "22px", "content-font-size1": "22px", "ui-font-size1": "15px"}},
    "@jupyterlab/application-extension:shell": {"startMode": "single"},
    "@jupyterlab/notebook-extension:tracker": {
        "codeCellConfig": {"lineNumbers": False, "lineWrap": True}, "maxNumberOutputs": 0, "scrollPastEnd": True},
}
GIGABYTES = 4  # what a first set-up takes at most with a CPU build of torch, the downloads included
WINDOWS = os.name == "nt"


class Stop(Exception):
    """One line for the user: what is wrong and what to do."""


def say(text):
    print("labkit: " + text, flush=True)


def check_python():
    """Refuse a Python or a machine for which there is no torch to install."""
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        raise Stop(f"this is Python {sys.version_info[0]}.{sys.version_info[1]}, the lab needs 3.{OLDEST[1]} to "
                   f"3.{NEWEST[1]}: install one and run start.py with it.")
    if sys.maxsize < 2**32:
        raise Stop("this is a 32-bit Python and PyTorch has no builds for it: install a 64-bit one.")
    if platform.system() == "Darwin" and platform.machine() == "x86_64":
        raise Stop("PyTorch has no builds for Python on Intel Macs: use `conda env create -f environment.yml` there; "
                   "on Apple silicon, run start.py with an arm64 Python.")


# ---- the environment --------------------------------------------------------------------------------------------


def venv_python():
    return os.path.join(VENV, "Scripts", "python.exe") if WINDOWS else os.path.join(VENV, "bin", "python")


def clean_environment():
    """The variables children run with: those of the shell, less what would pull in another Python's packages."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONHOME", "PYTHONPATH", "__PYVENV_LAUNCHER__")}
    env.update(JUPYTER_PREFER_ENV_PATH="1", PIP_DISABLE_PIP_VERSION_CHECK="1", PYTHONUTF8="1")
    # glibc hands big blocks back to the kernel and faults them in again at every layer. Keeping them makes a network
    # on the CPU a good deal faster; other systems do not read these names.
    env.setdefault("MALLOC_MMAP_THRESHOLD_", "1073741824")
    env.setdefault("MALLOC_TRIM_THRESHOLD_", "4294967296")
    return env


def wanted(extras):
    """What the environment is to be: equal to the stamp's content if there is nothing to do."""
    digest = hashlib.sha256()
    for name in ("constraints.txt", "pyproject.toml"):
        with open(os.path.join(ROOT, name), "rb") as file:
            digest.update(file.read().replace(b"\r\n", b"\n") + b"\0")
    return {
        "inputs": digest.hexdigest(),
        "python": "%d.%d" % sys.version_info[:2],
        "folder": ROOT,
        "torch_index": os.environ.get("LABKIT_TORCH_INDEX", ""),
        "extras": sorted(extras),
    }


def stamped():
    """What the environment is, or {} if it has never been finished."""
    try:
        with open(STAMP, encoding="utf-8") as file:
            stamp = json.load(file)
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def up_to_date(have, want):
    """True if nothing is to be installed: all equal, and every extra there (more of them do no harm)."""
    same = all(have.get(key) == want[key] for key in ("inputs", "python", "folder"))
    return same and not other_torch(have, want) and set(want["extras"]) <= set(have.get("extras", []))


def other_torch(have, want):
    """True if torch is now asked for from another index; that the variable is no longer set asks for nothing."""
    return want["torch_index"] not in ("", have.get("torch_index", ""))


def reason_to_rebuild(have, want):
    """Why an existing .venv cannot be repaired in place; None if it can."""
    if os.path.exists(UNFINISHED):
        return "an earlier set-up was interrupted"
    if have.get("folder", ROOT) != ROOT:
        return "the project was moved"
    if have and other_torch(have, want):
        return "torch is wanted from another index"
    code = "import sys, pip; print('%d.%d' % sys.version_info[:2])"
    try:
        answer = subprocess.run([venv_python(), "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                env=clean_environment(), timeout=120)
    except (OSError, subprocess.TimeoutExpired):
        return "its Python does not start"
    if answer.returncode:
        return "its Python or its pip does not work"
    there, here = answer.stdout.decode().strip(), want["python"]
    return None if there == here else f"it was made by Python {there}, this is {here}"


def remove_venv():
    if os.path.abspath(sys.prefix) == os.path.abspath(VENV):
        raise Stop("start.py runs with the Python of .venv, which has to be rebuilt: run it with your own Python.")
    try:
        if os.path.islink(VENV):
            os.unlink(VENV)
        else:
            shutil.rmtree(VENV)
    except OSError as error:
        raise Stop(f"cannot remove .venv ({error.strerror}): close what uses it, delete it by hand, run again.")


def step(arguments, problem):
    """Run a step of the set-up in ROOT; its output goes to the terminal, a failure becomes one line."""
    code = subprocess.call(arguments, cwd=ROOT, env=clean_environment(), stdin=subprocess.DEVNULL)
    if code:
        raise Stop(f"{problem} (exit code {code}, details above).")


def install(extras, torch_index):
    """Let pip install the package, editable, with what it needs, pinned; returns pip's exit code."""
    command = [venv_python(), "-m", "pip", "install", "--progress-bar=off", "-c", "constraints.txt"]
    if torch_index:
        command += ["--extra-index-url", torch_index]
    command += ["-e", f".[{','.join(sorted(extras))}]"]
    with subprocess.Popen(command, cwd=ROOT, env=clean_environment(), stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE) as pip:
        for line in pip.stdout:  # of pip's hundreds of lines, the few that say why it takes long
            line = line.decode("utf-8", "replace").strip()
            if re.match(r"Downloading .*\((\d{2,}(\.\d+)? MB|.* GB)\)", line):
                print("    " + line, flush=True)
            elif line.startswith("Installing collected packages"):
                print(f"    Installing {line.count(',') + 1} packages", flush=True)
    return pip.returncode


def build(want):
    """Bring .venv to `want`: made if absent, made anew if it cannot be trusted, else completed by pip."""
    have = stamped()
    if os.path.lexists(VENV):
        reason = reason_to_rebuild(have, want)
        if reason:
            say(f"making .venv anew: {reason}.")
            remove_venv()
            have = {}
    if not os.path.lexists(VENV):
        free = shutil.disk_usage(ROOT).free / 1e9
        if free < GIGABYTES:
            raise Stop(f"{free:.1f} GB free on this disk, the set-up needs {GIGABYTES}: make room and run again.")
        say(f"making .venv with Python {want['python']}")
        step([sys.executable, "-m", "venv", VENV], "cannot make .venv: on Debian and Ubuntu install python3-venv")

    if os.path.exists(STAMP):
        os.remove(STAMP)
    # From here until pip returns by itself, a killed process leaves packages half unpacked that pip believes to be
    # whole. The mark makes the next run begin afresh.
    with open(UNFINISHED, "w"):
        pass
    say("installing the pinned packages (some minutes the first time)")
    want["extras"] = sorted(set(want["extras"]) | set(have.get("extras", [])))  # what was there stays there
    code = install(want["extras"], want["torch_index"])
    if code >= 0:  # pip came to an end, good or bad; a negative code is the signal that ended it
        os.remove(UNFINISHED)
    if code:
        raise Stop(f"pip could not install the packages (exit code {code}, details above): check network and disk "
                   "space, run again.")
    step([venv_python(), "-c", "import torch, labkit, jupyterlab, nbval"],
        "the packages are installed but do not load; on Windows, PyTorch needs the Visual C++ redistributable")
    settings = os.path.join(VENV, "share", "jupyter", "lab", "settings")
    os.makedirs(settings, exist_ok=True)
    with open(os.path.join(settings, "overrides.json"), "w", encoding="utf-8") as file:
        # JupyterLab would ask every newcomer whether it may fetch news.
        json.dump({"@jupyterlab/apputils-extension:notification": {"fetchNews": "false"}}, file)
    with open(STAMP, "w", encoding="utf-8") as file:
        json.dump(want, file, indent=1)


@contextlib.contextmanager
def locked():
    """Let one set-up of this folder run at a time; the system frees the lock when its holder dies."""
    with open(os.path.join(ROOT, ".venv.lock"), "a+") as file:
        waiting = False
        while True:
            try:
                if WINDOWS:
                    import msvcrt

                    file.seek(0)
                    msvcrt.locking(file.fileno(), msvcrt.LK_LOCK if waiting else msvcrt.LK_NBLCK, 1)
                else:
                    import fcntl

                    fcntl.flock(file, fcntl.LOCK_EX | (0 if waiting else fcntl.LOCK_NB))
                break
            except OSError:
                if not waiting:
                    say("another start.py is setting up this folder; waiting for it")
                waiting = True
        yield


def set_up(further=()):
    """Make the environment what pyproject.toml and constraints.txt ask for; nothing if it is that already."""
    check_python()
    extras = EXTRAS | set(further) | set(os.environ.get("LABKIT_EXTRAS", "").replace(",", " ").split())
    want = wanted(extras)

    def ready():
        return os.path.exists(venv_python()) and not os.path.exists(UNFINISHED) and up_to_date(stamped(), want)

    if ready():
        return
    try:
        with locked():
            if not ready():  # another start.py may have done it while this one waited
                build(want)
    except PermissionError as error:
        raise Stop(f"cannot write {error.filename}: copy the project to a folder of your own.")
    say("set up")


# ---- what to do with it -----------------------------------------------------------------------------------------


def notebook_path():
    return os.path.join(ROOT, "notebooks", NOTEBOOK + ".ipynb")


def foreground(command, env):
    """Run a program that deals with Ctrl+C itself, and wait until it has done so; returns its exit code."""
    child = subprocess.Popen(command, cwd=ROOT, env=env)
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        return child.wait()
    finally:
        signal.signal(signal.SIGINT, before)


def run_jupyterlab(address, *options):
    """JupyterLab at one of its addresses: this machine only, token kept, nothing asked of the network."""
    say("opening JupyterLab; to stop it, press Ctrl+C here and answer y")
    root = ["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []  # the rule inside containers
    code = foreground(
        [venv_python(), "-m", "jupyterlab", *root, "--ServerApp.ip=127.0.0.1", "--ServerApp.root_dir=" + ROOT,
         "--LabApp.default_url=" + address, *options],
        clean_environment())
    if code > 0:
        raise Stop(f"JupyterLab ended with exit code {code} (details above).")
    return 0


def open_lab():
    """JupyterLab on the first notebook."""
    if not os.path.exists(notebook_path()):
        raise Stop(f"notebooks/{NOTEBOOK}.ipynb is missing: get the project again.")
    return run_jupyterlab(f"/lab/tree/notebooks/{NOTEBOOK}.ipynb")


def find_notebook(number):
    """The name of the notebook with this number ("8" and "08" are one); unknown numbers are answered with a list."""
    folder = os.path.join(ROOT, "notebooks")
    found = os.listdir(folder) if os.path.isdir(folder) else []
    names = {name[:2]: name for name in sorted(found) if re.match(r"\d\d_.*\.ipynb$", name)}
    if number.zfill(2) not in names:
        there = ", ".join(name[:-len(".ipynb")] for name in names.values()) or "none: get the project again"
        raise Stop(f"there is no notebook {number!r}; say its two digits. There are: {there}.")
    return names[number.zfill(2)]


def write_json(path, content):
    """Write a file under a temporary name, then rename it: whoever reads it finds the old or the new one whole."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path + ".part", "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
    os.replace(path + ".part", path)


def copy_for_class(name):
    """A fresh copy of a notebook in out/, as deep as notebooks/ so that its links hold, without outputs: a class that
    is asked to predict should not read the answer, and saved widgets do not draw before they have run."""
    with open(os.path.join(ROOT, "notebooks", name), encoding="utf-8") as file:
        notebook = json.load(file)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None
            cell["metadata"]["scrolled"] = False  # a figure is shown whole, never in a box with a scroll bar
        else:  # a link to a sibling leads to the sibling
            cell["source"] = re.sub(r"\]\((?=\d\d_)", "](../notebooks/", "".join(cell["source"]))
    copy = os.path.join(ROOT, "out", name)
    write_json(copy, notebook)
    return copy


def voila(notebook):
    """How Voila is started: this machine only; a cell that fails says why."""
    return ["-m", "voila", notebook, "--Voila.ip=127.0.0.1", "--show_tracebacks=True"]


def present(number, as_page):
    """A notebook for a projector, from a copy; the settings of the presenter's own JupyterLab stay as they are."""
    name = find_notebook(number)
    copy = copy_for_class(name)
    say(f"presenting a fresh copy, out/{name}; notebooks/{name} stays as it is")
    if as_page:
        say("the page appears when all cells have run; to stop it, press Ctrl+C here")
        code = foreground([venv_python(), *voila(copy)], clean_environment())
        if code > 0:
            raise Stop(f"Voila ended with exit code {code} (details above).")
        return 0
    own = os.path.join(ROOT, "out", "present")
    for plugin, values in PROJECTOR.items():  # as a user's settings: the theme's sizes are read from nowhere else
        write_json(os.path.join(own, "settings", *plugin.split(":")) + ".jupyterlab-settings", values)
    return run_jupyterlab(
        "/doc/tree/out/" + name, "--LabApp.user_settings_dir=" + os.path.join(own, "settings"),
        "--LabApp.workspaces_dir=" + os.path.join(own, "workspaces"))


def run_tests(arguments):
    """pytest over tests and notebooks; the hub is off, for no test may need the network."""
    env = clean_environment()
    env.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    return foreground([venv_python(), "-m", "pytest"] + arguments, env)


def run_headless():
    """Run the first notebook and leave it as one HTML page, its figures inside; nothing is written on failure."""
    if not os.path.exists(notebook_path()):
        raise Stop(f"notebooks/{NOTEBOOK}.ipynb is missing: get the project again.")
    out = os.path.join(ROOT, "out")
    os.makedirs(out, exist_ok=True)
    say(f"running notebooks/{NOTEBOOK}.ipynb (about a minute)")
    done = subprocess.run(
        [venv_python(), "-m", "nbconvert", "--execute", "--to", "html", "--template", TEMPLATE, "--output-dir", out,
         notebook_path(),
         # A page with saved widgets fetches their code from the network and, offline, shows nothing at all.
         "--ExecutePreprocessor.store_widget_state=False", "--ExecutePreprocessor.timeout=600",
         "--ExecutePreprocessor.kernel_name=python3"],
        cwd=ROOT, env=clean_environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        print(done.stdout.decode("utf-8", "replace"), file=sys.stderr)
        raise Stop("the notebook failed (details above).")
    say("wrote " + os.path.join(out, NOTEBOOK + ".html"))
    return 0


def main(arguments):
    if arguments in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    if arguments[:1] == ["--present"]:
        if len(arguments) < 2 or arguments[2:] not in ([], ["--voila"]):
            raise Stop("cannot do that: say `start.py --present NN`, NN the notebook's two digits, or "
                       "`start.py --present NN --voila`.")
        find_notebook(arguments[1])  # before anything is installed
        as_page = arguments[2:] == ["--voila"]
        set_up({"present"} if as_page else ())
        return present(arguments[1], as_page)
    if not (arguments in ([], ["--headless"]) or arguments[0] == "test"):
        raise Stop(f"cannot do {' '.join(arguments)!r}: there are `start.py`, `start.py test [pytest arguments]`, "
                   "`start.py --headless` and `start.py --present NN`.")
    set_up()
    if not arguments:
        return open_lab()
    return run_headless() if arguments == ["--headless"] else run_tests(arguments[1:])


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except Stop as stop:
        print("labkit: " + str(stop), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nlabkit: stopped.", file=sys.stderr)
        sys.exit(130)
