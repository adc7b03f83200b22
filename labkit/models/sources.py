"""Where models come from: the shipped one, a folder, the cache, the hub; and whether they are still what they were.

A name is looked up in this order: "tabletop", a folder or a file of this machine, a hub id ("org/name"), a file of a hub repository
("org/name/file.safetensors", or its address). A hub's is first looked for in the local cache; the network is asked only for what is not
there, and only for the files that are opened: configs, tokenizer and one set of safetensors (a whole Stable Diffusion repository holds
the same weights many times over, 40 GB and more).
"""

import hashlib
import json
import os
import re
import socket
from pathlib import Path
from urllib.parse import urlparse

import torch

from labkit.errors import CheckpointError
from labkit.models.files import PICKLES, choose_weights
from labkit.models.header import regular_size

DATA = Path(__file__).parents[2] / "data"
HUB_FILE = re.compile(  # as diffusers' from_single_file takes them, and as the hub's pages give them
    r"(?:(?:https://)?(?:huggingface\.co|hf\.co)/)?(?P<repo>\w[\w.-]*/\w[\w.-]*)/(?:(?:blob|resolve)/(?P<revision>[\w.-]+)/)?"
    r"(?P<file>(?:\w[\w.-]*/)*\w[\w .()+-]*\.(?P<end>safetensors|ckpt|pt|pth|bin))(?:\?download=true)?"
)
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model", "text_encoder_2": "model"}


def resolve(name: str | Path, dtype: torch.dtype | None = None, variant: str | None = None) -> Path:
    """Where a model is: "tabletop" is in data/, a folder or a .safetensors file is itself, what is on the hub is looked up in the cache, then fetched.

    `dtype` and `variant` say which of a hub repository's weights are wanted (`files.choose_weights`).
    """
    if not isinstance(name, (str, Path)) or not str(name).strip():
        raise CheckpointError(f"A model's name is a text or a path, this is {name!r}. {_possible()}")
    path = Path(os.path.expanduser(name))  # unlike Path.expanduser, leaves "~nobody" as it is
    if str(name) == "tabletop":
        path = DATA / "tabletop"
        if not path.is_dir():
            raise CheckpointError(f"{path}: the shipped model is not there; labkit must be run from its own folder (pip install -e .).")
        return path
    if len(str(name)) > 1000:  # longer than a file system allows, which would raise errors of its own
        raise CheckpointError(f"No model called {str(name)[:20]!r}... {_possible()}")
    try:
        if path.is_dir():
            return path
        if path.is_file() and path.suffix.lower() in PICKLES:
            raise CheckpointError(
                f"{path}: pickled weights can run code when opened, so labkit does not open them; convert the file once with "
                f"`python -m labkit convert {path.name} {path.stem}.safetensors`, which runs none of it."
            )
        if path.exists() and path.suffix.lower() != ".safetensors":
            raise CheckpointError(f"{path}: is no model; labkit opens a folder in the diffusers layout and a one-file checkpoint (.safetensors).")
        if path.exists():
            regular_size(path)  # not a pipe, which would be waited for
            return path
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from None
    # "runs/last" could be on the hub, but where there is a folder "runs" here, it is a folder mistyped
    if isinstance(name, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) and not Path(name.split("/")[0]).is_dir():
        return _from_hub(name, dtype, variant)
    if isinstance(name, str) and (found := HUB_FILE.fullmatch(name)) and not Path(name.split("/")[0]).is_dir():
        return _file_from_hub(found["repo"], found["file"], found["revision"])
    raise CheckpointError(f"No model called {str(name)!r}. {_possible()}")


def verify_sums(folder: str | Path) -> None:
    """Compare every file of a folder that SHA256SUMS (in it or beside it) lists; raises CheckpointError at the first that differs."""
    folder = Path(folder)
    sums = next((p for p in (folder / "SHA256SUMS", folder.parent / "SHA256SUMS") if p.exists()), None)
    if sums is None:
        raise CheckpointError(f"{folder}: its SHA256SUMS is missing, so the weights cannot be checked; fetch it again (git checkout).")
    listed = [line.split(maxsplit=1) for line in sums.read_text(encoding="utf-8").splitlines() if line.strip()]
    mine = [(s, sums.parent / n.lstrip("*")) for s, n in listed if (sums.parent / n.lstrip("*")).is_relative_to(folder)]
    if not mine:
        raise CheckpointError(f"{sums}: lists no file of {folder.name}; fetch it again (git checkout).")
    for expected, path in mine:
        if not path.exists():
            raise CheckpointError(f"{path}: is listed in {sums.name} but missing; fetch it again (git checkout).")
        found = _sha256(path)
        if found != expected.lower():
            raise CheckpointError(f"{path}: its SHA-256 is {found[:12]}..., {sums.name} says {expected[:12]}...; it was changed: fetch it again.")


def write_sums(data: str | Path) -> Path:
    """Write SHA256SUMS for every file below a folder, in the format of `sha256sum -c`, and return its path."""
    data = Path(data)
    files = sorted(p for p in data.rglob("*") if p.is_file() and p.name != "SHA256SUMS" and not p.name.startswith("."))
    text = "".join(f"{_sha256(p)}  {p.relative_to(data).as_posix()}\n" for p in files)
    (data / "SHA256SUMS").write_text(text, encoding="utf-8", newline="\n")
    return data / "SHA256SUMS"


def _from_hub(repo: str, dtype: torch.dtype | None, variant: str | None) -> Path:
    """A hub repository's folder in the local cache, fetched if it is not there; only the files that load_pipeline opens."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    folders = (*STEMS, "tokenizer", "tokenizer_2", "scheduler")
    configs = ["model_index.json", "labkit.json", *(f"{part}/*.{end}" for part in folders for end in ("json", "txt"))]
    there: set[str] = set()
    try:
        folder = Path(huggingface_hub.snapshot_download(repo, allow_patterns=configs, local_files_only=True))
        there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        named = json.loads((folder / "model_index.json").read_text(encoding="utf-8")) if "model_index.json" in there else {}
        _needed(there, repo, dtype, variant, {part for part in STEMS if named.get(part) not in (None, [None, None])})
        return folder
    except (LocalEntryNotFoundError, CheckpointError, ValueError, AttributeError, RecursionError, OSError):
        pass  # nothing, or not all of it, is in the cache
    half = f".{variant}" if variant else ".fp16" if dtype == torch.float16 else ""
    wanted = ["*.json", "*.txt", *(f"{part}/{stem}{half}.safetensors" for part, stem in STEMS.items())]
    command = f"`hf download {repo} {' '.join(f'--include {w!r}' for w in wanted)}`"
    if why := _no_network(huggingface_hub):
        if "model_index.json" not in there and _one_files(there):
            _needed(there, repo, dtype, variant)  # says how to name it
        raise CheckpointError(f"{repo}: not in this machine's cache, and {why}; fetch it once with {command}, or load('tabletop'), which is shipped.")
    try:
        weights = _needed(set(huggingface_hub.HfApi().list_repo_files(repo)), repo, dtype, variant)
        return Path(huggingface_hub.snapshot_download(repo, allow_patterns=[*configs, *weights]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(f"{repo}: could not be fetched ({' '.join(str(error).split())[:200]}); check the name and the network.") from None


def _file_from_hub(repo: str, file: str, revision: str | None) -> Path:
    """One file of a hub repository, in the local cache, fetched if it is not there."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    whole, command = f"{repo}/{file}", f"`hf download {repo} '{file}'{f' --revision {revision}' if revision else ''}`"
    if file.endswith(PICKLES):
        target = f"{Path(file).stem}.safetensors"
        raise CheckpointError(
            f"{whole}: pickled weights can run code when opened, so labkit does not open them; name a .safetensors file of the repository, or fetch this "
            f"one with {command} and convert what it prints with `python -m labkit convert PATH {target}`, which runs none of it."
        )
    try:
        return Path(huggingface_hub.hf_hub_download(repo, file, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    if why := _no_network(huggingface_hub):
        raise CheckpointError(f"{whole}: is no file here, not in this machine's cache, and {why}; fetch it once with {command}.")
    try:
        return Path(huggingface_hub.hf_hub_download(repo, file, revision=revision))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(f"{whole}: could not be fetched ({' '.join(str(error).split())[:200]}); check the name and the network.") from None


def _one_files(files: set[str]) -> list[str]:
    """What may be a checkpoint of one file: the safetensors at the root of a repository."""
    return sorted(file for file in files if file.endswith(".safetensors") and "/" not in file)


def _needed(files: set[str], repo: str, dtype: torch.dtype | None, variant: str | None, named: set[str] = frozenset()) -> list[str]:
    """The weight files of a repository that will be opened; raises CheckpointError if one part (those `named` among them) has none."""
    if "model_index.json" not in files:
        files_there = " or ".join(f"load({f'{repo}/{file}'!r})" for file in _one_files(files)[:3])
        advice = f"; for a checkpoint of one file, name the file: {files_there}" if files_there else ""
        raise CheckpointError(f"{repo}: has no model_index.json, so it is not a model in the diffusers layout{advice}.")
    there = {"unet", "vae", *named} | {part for part in STEMS if any(f.startswith(f"{part}/") for f in files)}
    chosen = []
    for part in [p for p in STEMS if p in there or (p == "text_encoder" and "text_encoder_2" not in there)]:
        stem, names = STEMS[part], {f.removeprefix(f"{part}/") for f in files if f.startswith(f"{part}/")}
        try:
            weights = choose_weights(names, stem, dtype, variant)
        except CheckpointError as error:
            raise CheckpointError(f"{repo}, {part}/: {error}") from None
        if weights.endswith(".json"):  # shards, whatever their number: stem-00001-of-00002.safetensors or with .fp16 before
            mark = re.fullmatch(rf"{stem}\.safetensors\.index(\.\w+)?\.json", weights)[1]
            shards = [n for n in names if re.fullmatch(rf"{stem}\S*-of-\d+\S*\.safetensors", n)]
            chosen += sorted(f"{part}/{n}" for n in shards if re.findall(r"\.[a-z]\w*(?=[-.])", n.removeprefix(stem)) == ([mark] if mark else []))
        chosen.append(f"{part}/{weights}")
    return chosen


def _no_network(huggingface_hub) -> str | None:
    """Why the hub cannot be reached, found out in a moment (the hub's own client would try for half a minute); None if it may be."""
    if huggingface_hub.constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return "HF_HUB_OFFLINE is set"
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return None
    url = urlparse(huggingface_hub.constants.ENDPOINT)
    try:
        socket.create_connection((url.hostname, url.port or (443 if url.scheme == "https" else 80)), timeout=5).close()
    except OSError:
        return f"there is no connection to {url.hostname}"
    return None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _possible() -> str:
    return (
        "Possible are 'tabletop' (shipped), a folder in the diffusers layout, a one-file .safetensors, or a hub id such as "
        "'stable-diffusion-v1-5/stable-diffusion-v1-5', with /FILE.safetensors behind it for a checkpoint of one file."
    )
