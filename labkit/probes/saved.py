"""A trace on disk: a folder with the numbers, trace.safetensors, and all that is needed to read them and to know where they are from, trace.json.

    provenance   recipe (prompt, seed, sampler, ...), name of the model, SHA-256 of the weights of each part, versions

It is read without its model: words are found in the prompts' tokens, which are saved with it. The weights' hash goes over names, shapes
and bytes of all parameters, so it is the same for any file layout that holds the same weights.
"""

import hashlib
import platform
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from labkit.diffusion import LatentDiffusion
from labkit.errors import CheckpointError, LabkitError
from labkit.generation import to_pil
from labkit.models.files import read_json, read_safetensors, write_json, write_safetensors
from labkit.models.tokenizer import BOS, EOS, Tokens
from labkit.models.whole import whole_folder
from labkit.probes.keep import Keep, Plan, Store
from labkit.probes.sites import Site
from labkit.probes.trace import Run, Trace
from labkit.samplers import Step

NUMBERS, STORY, FORMAT = "trace.safetensors", "trace.json", 1


@dataclass(frozen=True)
class KnownTokens:
    """The part of a tokenizer that words need, for the prompts of a trace alone."""

    max_length: int
    known: dict[str, Tokens]

    def tokenize(self, text: str) -> Tokens:
        if text not in self.known:
            raise LabkitError(f"This trace knows the tokens of its prompts only, not those of {text!r}.")
        return self.known[text]

    def encode(self, text: str) -> Tokens:
        """With start and end, as far as it fits."""
        all_of_it, n = self.tokenize(text), self.max_length - 2
        return Tokens((-1, *all_of_it.ids[:n], -1), (BOS, *all_of_it.pieces[:n], EOS), (None, *all_of_it.spans[:n], None))


def save_trace(trace: Trace, folder: str | Path, overwrite: bool = False) -> Path:
    """Save all runs of a trace as a folder, complete or not at all; CheckpointError if it is there already or cannot be written."""
    if not trace.runs:
        raise LabkitError("Nothing was recorded, so there is nothing to save.")
    numbers: dict[str, Tensor] = {}
    story = {"labkit_trace": FORMAT, "model": provenance(trace.lab) if trace.lab else trace.run.model, "runs": []}
    for r, run in enumerate(trace.runs):
        numbers |= {f"{r}.{name}": x for name, x in tensors(run).items()}
        story["runs"].append(told(run))
    with whole_folder(Path(folder).absolute(), overwrite, STORY) as unfinished:
        write_safetensors(numbers, unfinished / NUMBERS)
        write_json(story, unfinished / STORY)
    return Path(folder).absolute()


def load_trace(folder: str | Path, lab: LatentDiffusion | None = None) -> Trace:
    """A trace as it was saved; with the model `lab` it can decode the pictures again.

    Raises CheckpointError if files are missing or damaged, or if `lab` has other weights than the trace was recorded with.
    """
    folder = Path(folder)
    story = read_json(folder / STORY)
    if story.get("labkit_trace") != FORMAT:
        raise CheckpointError(f"{folder / STORY}: is no trace of this version of labkit ({FORMAT}); record it again.")
    if lab is not None and (said := story["model"].get("sha256")) != (is_ := hashes(lab)):
        other = next((part for part in is_ if (said or {}).get(part) != is_[part]), "text encoders")
        raise CheckpointError(f"{folder}: was recorded with other weights of the {other} than {lab.name} has; load it without a model.")
    numbers = read_safetensors(folder / NUMBERS)
    try:
        runs = [restored(said, r, numbers) for r, said in enumerate(story["runs"])]
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{folder / STORY}: does not fit {NUMBERS} ({type(error).__name__}: {error}); record it again.") from None
    for run in runs:
        run.model = story["model"]
        run.decode = (lambda x: to_pil(lab.decode(x))[0]) if lab is not None else None
    return Trace(lab, runs)


def provenance(lab: LatentDiffusion) -> dict:
    """Which model this is: name, SHA-256 of each part's weights, versions of what computes it."""
    versions = {"labkit": sys.modules["labkit"].__version__, "torch": torch.__version__, "python": platform.python_version()}
    return {"name": lab.name, "dtype": str(lab.dtype).removeprefix("torch."), "device": lab.device.type, "sha256": hashes(lab), "versions": versions}


def hashes(lab: LatentDiffusion) -> dict[str, str]:
    """SHA-256 of the weights of each part."""
    parts = {"unet": lab.unet, "vae": lab.vae, "text_encoder": lab.text_encoder, "text_encoder_2": lab.text_encoder_2}
    return {name: weights_hash(part) for name, part in parts.items() if part is not None}


def weights_hash(network: nn.Module) -> str:
    """SHA-256 of a network's parameters: of each, in the order of their names, name, type, shape and bytes."""
    digest = hashlib.sha256()
    for name, x in sorted(network.state_dict().items()):
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}\n".encode())
        digest.update(memoryview(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


# --- a run as numbers and as a story ------------------------------------------------------------------------------


def tensors(run: Run) -> dict[str, Tensor]:
    """All numbers of a run by name."""
    found = {f"store.{'/'.join(key)}": store.values for key, store in run.stores.items()}
    found |= {f"text.{'/'.join(key)}": x for key, x in run.texts.items()}
    found |= {f"step.{k}.{name}": getattr(step, name) for k, step in enumerate(run.steps) for name in ("x", "eps", "x0")}
    return found | ({} if run.final is None else {"final": run.final.clone()})  # it may be the last step's own x


def told(run: Run) -> dict:
    """All else of a run, as JSON."""
    prompts = {text: run.tokenizer.tokenize(text) for texts in run.prompts.values() for text in texts}
    return {
        "recipe": run.recipe,
        "prompts": run.prompts,
        "size": run.size,
        "images": run.images,
        "tokens": {text: [t.ids, t.pieces, t.spans] for text, t in prompts.items()},
        "max_length": run.tokenizer.max_length,
        "plan": None if run.plan is None else asdict(run.plan),
        "stores": [{"key": key, "apart": store.apart, "calls": store.calls, "steps": store.steps} for key, store in run.stores.items()],
        "steps": [[step.i, float(step.t), None if step.next_t is None else float(step.next_t)] for step in run.steps],
    }


def restored(said: dict, r: int, numbers: dict[str, Tensor]) -> Run:
    """A run of its numbers and its story."""
    tokens = {text: Tokens(tuple(ids), tuple(pieces), tuple(tuple(span) for span in spans)) for text, (ids, pieces, spans) in said["tokens"].items()}
    run = Run(KnownTokens(said["max_length"], tokens), said["recipe"], size=tuple(said["size"]), images=said["images"])
    run.prompts = {branch: tuple(texts) for branch, texts in said["prompts"].items()}
    if (plan := said["plan"]) is not None:
        kept = {**plan["keep"], "layers": plan["keep"]["layers"] if isinstance(plan["keep"]["layers"], str) else tuple(plan["keep"]["layers"])}
        sites = {tap: Site(**{**site, "shape": tuple(site["shape"])}) for tap, site in plan["sites"].items()}
        shapes = {tap: tuple(shape) for tap, shape in plan["shapes"].items()}
        run.plan = Plan(Keep(**{**kept, "branches": tuple(kept["branches"])}), sites, shapes, tuple(plan["branches"]), plan["columns"])
    for store in said["stores"]:
        run.stores[tuple(store["key"])] = Store(numbers[f"{r}.store.{'/'.join(store['key'])}"], store["apart"], store["calls"], store["steps"])
    prefix = f"{r}.text."
    run.texts = {tuple(name.removeprefix(prefix).split("/")): x for name, x in numbers.items() if name.startswith(prefix)}
    for k, (i, t, later) in enumerate(said["steps"]):
        x, eps, x0 = (numbers[f"{r}.step.{k}.{name}"] for name in ("x", "eps", "x0"))
        run.steps.append(Step(i, whole(t), x, eps, x0, later if later is None else whole(later)))
    run.final = numbers.get(f"{r}.final")
    return run


def whole(t: float) -> int | float:
    """A timestep of the table as the integer it is."""
    return int(t) if t == int(t) else t
