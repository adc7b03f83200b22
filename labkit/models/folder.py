"""A model's folder in the diffusers layout, part by part: configurations, tensors, tokenizer. The layout is told in checkpoint.py."""

from pathlib import Path

import torch
from torch import Tensor

from labkit.errors import CheckpointError
from labkit.models.files import check_links, read_json, read_tensors
from labkit.models.sources import STEMS
from labkit.models.tokenizer import Tokenizer


class Folder:
    """What `OneFile` is for one file: `index()`, `config(part)`, `tensors(part)`, `tokenizer(part)`; all raise CheckpointError."""

    def __init__(self, root: Path, variant: str | None = None, check: bool = False) -> None:
        self.path, self.variant, self.check = root, variant, check
        try:
            if not (root / "model_index.json").exists():
                if (root / "config.json").exists() and (root.parent / "model_index.json").exists():
                    raise CheckpointError(f"{root}: is one part of a model; give the folder above it, {root.parent}.")
                raise CheckpointError(f"{root}: no model_index.json, so this is not a model in the diffusers layout; give the folder that holds it.")
            check_links(root)
        except OSError as error:
            raise CheckpointError(f"{root}: cannot be read ({error.strerror}).") from None

    def where(self, part: str) -> Path:
        """The file of a part's configuration."""
        return self.path / part / ("scheduler_config.json" if part == "scheduler" else "config.json")

    def index(self) -> dict:
        return read_json(self.path / "model_index.json")

    def metadata(self) -> dict:
        """labkit.json, if it is there."""
        return read_json(self.path / "labkit.json") if (self.path / "labkit.json").exists() else {}

    def config(self, part: str) -> dict:
        return read_json(self.where(part))

    def tensors(self, part: str, device="cpu", dtype: torch.dtype | None = None) -> tuple[dict[str, Tensor], Path]:
        """A part's tensors and the file they are in (or its index); on the device "meta", what the files say that they hold."""
        return read_tensors(self.path / part, STEMS[part], device, dtype, self.variant, self.check)

    def tokenizer(self, part: str, max_length: int) -> Tokenizer:
        """The tokenizer of a text encoder."""
        return Tokenizer.from_folder(self.path / part.replace("text_encoder", "tokenizer"), max_length)
