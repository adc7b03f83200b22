"""The house plan, held to: no import points up, none goes in a circle, nothing heavy loads by itself.

The layers are those of the table below; a module may import from lower layers and from its own, as long as no
circle comes of it. An import inside a function is an arrow like any other.
"""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# The main line, from the bottom up. A folder is one entry: its files share a layer.
LAYERS = [
    {"errors", "tap", "device"},
    {"schedule"},
    {"models", "mixture"},
    {"checkpoint", "convert", "samplers", "strips", "winograd"},
    {"guidance", "recipe", "generation"},
    {"diffusion"},
    {"packing", "probes", "editing"},
    {"plots", "widgets"},
    {"__init__", "__main__"},  # the front doors: they may open every room, no room may go out through them
]
LAYER = {room: i for i, rooms in enumerate(LAYERS) for room in rooms}

# Side rooms: the highest layer of the main line that each may use, and which other side rooms.
SIDE = {
    "scenes": (LAYER["schedule"], set()),
    "training": (LAYER["diffusion"], {"scenes"}),
    "adapters": (LAYER["diffusion"], set()),
    "checks": (LAYER["plots"], {"scenes"}),
    "measure": (LAYER["plots"], {"scenes"}),
}
# Where the main line may look into a side room.
DOORS = {("__main__", "training"), ("__main__", "scenes"), ("__main__", "measure"), ("__init__", "scenes")}
# A door up: what is measured can draw itself (`heatmap.plot()`), by functions of plots that take data and know nothing of the rest.
DOORS |= {("probes", "plots")}

# The one arrow up: `lab.edit(...)` is `labkit.edit(lab, ...)` in one line, because that is how people look for it.
CONVENIENCES = {("diffusion", "editing.prompt_to_prompt")}

# Packages that cost seconds to import, and oracles that labkit is compared with: never at module level, or never.
LAZY = {"matplotlib", "transformers", "ipywidgets", "IPython", "anywidget", "huggingface_hub"}
NEVER = {"diffusers"}


def modules(package: Path) -> dict[str, Path]:
    """All modules under `package`, by their name inside it: "tap", "models.unet", "models" for its __init__."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        found[name] = path
    return found


def imported(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the package that the file at `path` imports, wherever in the file it does so."""
    inside = name.split(".") if path.name == "__init__.py" and name != "__init__" else name.split(".")[:-1]
    arrows = set()

    def add(dotted: str, attribute: str = "") -> None:
        """`from a.b import c` is an arrow to a.b.c where that is a module, else to a.b."""
        for candidate in (f"{dotted}.{attribute}".strip("."), dotted or "__init__"):
            if candidate in known:
                arrows.add(candidate)
                return
        raise AssertionError(f"{path}: imports labkit.{dotted}, which does not exist")

    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first, _, rest = alias.name.partition(".")
                if first == "labkit":
                    add(rest)
        elif isinstance(node, ast.ImportFrom):
            target = (node.module or "").split(".") if node.module else []
            if node.level:
                up = len(inside) - (node.level - 1)
                assert up >= 0, f"{path}: a relative import leaves the package"
                target = inside[:up] + target
            elif target[0] == "labkit":
                target = target[1:]
            else:
                continue
            for alias in node.names:
                add(".".join(target), alias.name)
    return arrows


def faults(package: Path) -> list[str]:
    """Every arrow that the house plan forbids, as a sentence; empty if there is none."""
    known = modules(package)
    graph = {name: {to for to in imported(name, path, known) if (name, to) not in CONVENIENCES} for name, path in known.items()}
    wrong = []
    for name, targets in graph.items():
        room = name.split(".")[0]
        if room not in LAYER and room not in SIDE:
            wrong.append(f"{name} has no place in the house plan: give it one in DESIGN and in this table")
            continue
        for target in sorted(targets):
            other = target.split(".")[0]
            if other == room or (room, other) in DOORS:
                continue
            ceiling, neighbours = SIDE.get(room, (LAYER.get(room), set()))
            if other in SIDE:
                if other not in neighbours:
                    wrong.append(f"{name} imports the side room {target}")
            elif other in LAYER and LAYER[other] > ceiling:
                wrong.append(f"{name} imports {target}, which lies above it")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        wrong.append("a circle: " + " -> ".join(reversed(error.args[1])))
    return wrong


def top_level_imports(tree: ast.Module) -> set[str]:
    """The first names of all that is imported when the module is, `if TYPE_CHECKING:` left out."""
    names: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            return
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                visit(child)
            return
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return names


def all_imports(tree: ast.Module) -> set[str]:
    """The first names of all that is imported anywhere in the module."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def heavy(package: Path) -> list[str]:
    """Every module that loads a heavy package by being imported, or one of the oracles at all."""
    wrong = []
    for name, path in modules(package).items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        allowed = {"ipywidgets", "IPython", "anywidget"} if name.split(".")[0] == "widgets" else set()
        wrong += [f"{name} imports {p} at module level" for p in sorted(top_level_imports(tree) & (LAZY - allowed))]
        wrong += [f"{name} imports {p}" for p in sorted(all_imports(tree) & NEVER)]
    return wrong


def test_no_arrow_points_up_or_in_a_circle():
    assert len(modules(ROOT / "labkit")) > 10  # the walk did find the package
    assert faults(ROOT / "labkit") == []


def test_nothing_heavy_is_imported_by_importing_a_module():
    assert heavy(ROOT / "labkit") == []


def test_importing_labkit_is_light():
    code = ("import sys, labkit\n"
            "print([m for m in ('diffusers', 'transformers', 'matplotlib', 'ipywidgets') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


# ---- tests of the test: a house with known faults ----------------------------------------------------------------

SOUND = {
    "__init__.py": "",
    "errors.py": "class LabkitError(ValueError): pass",
    "tap.py": "from labkit.errors import LabkitError",
    "models/__init__.py": "from labkit.models.unet import UNet",
    "models/config.py": "import torch",
    "models/unet.py": "from . import config\nfrom ..tap import Tap",
    "guidance.py": "import labkit.models.unet",
    "diffusion.py": "from labkit import guidance",
    "plots.py": "def f():\n    import matplotlib\n    from labkit.diffusion import LatentDiffusion",
    "scenes/__init__.py": "from labkit.errors import LabkitError",
    "training/__init__.py": "import labkit.scenes, labkit.diffusion",
}


def build(folder: Path, **changed: str) -> Path:
    """A small package with the sound files, and those of `changed` ("models__unet" for models/unet.py) put in."""
    files = SOUND | {name.replace("__", "/") + ".py": text for name, text in changed.items()}
    for name, text in files.items():
        path = folder / "labkit" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder / "labkit"


def test_a_sound_house_passes(tmp_path):
    package = build(tmp_path)
    assert faults(package) == [] and heavy(package) == []


@pytest.mark.parametrize("name, text, said", [
    ("models__unet", "from labkit.guidance import w", "models.unet imports guidance, which lies above it"),
    ("models__unet", "from ..diffusion import LatentDiffusion", "models.unet imports diffusion, which lies above"),
    ("models__unet", "def f():\n    import labkit.plots", "models.unet imports plots, which lies above it"),
    ("models__unet", "from labkit import load", "models.unet imports __init__, which lies above it"),
    ("models__config", "from labkit.models.unet import UNet\n", "a circle: "),
    ("models__config", "def f():\n    from labkit.models import unet\n", "a circle: "),
    ("errors", "from labkit.tap import Tap", "a circle: "),
    ("scenes__render", "from labkit.models.unet import UNet", "scenes.render imports models.unet, which lies above"),
    ("diffusion", "import labkit.training", "diffusion imports the side room training"),
    ("cellar", "import torch", "cellar has no place in the house plan"),
])
def test_a_wrong_arrow_is_reported(tmp_path, name, text, said):
    found = faults(build(tmp_path, **{name: text}))
    assert any(fault.startswith(said) for fault in found), found


@pytest.mark.parametrize("text, said", [
    ("import matplotlib.pyplot as plt", ["plots imports matplotlib at module level"]),
    ("try:\n    from transformers import CLIPTokenizer\nexcept ImportError: pass",
     ["plots imports transformers at module level"]),
    ("def f():\n    from diffusers import DDIMScheduler", ["plots imports diffusers"]),
    ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from matplotlib.figure import Figure", []),
])
def test_a_heavy_import_is_reported(tmp_path, text, said):
    assert heavy(build(tmp_path, plots=text)) == said
