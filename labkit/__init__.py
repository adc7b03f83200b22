"""labkit: a lab for latent diffusion models, every part of it written to be read, measured, interrupted and edited.

    import labkit

    lab = labkit.load("tabletop")                                # the shipped model; or a folder; or a hub id
    with labkit.record(lab) as trace:
        picture = lab.generate("a red sphere left of a blue cube", seed=0).image
    labkit.plots.show(labkit.plots.word_heatmaps(picture, trace.heatmaps()))

One spelling everywhere, in code and in text, as in the papers:

    x0          the clean latent of a picture, (B, 4, h, w); with a hat in print where it is a prediction
    x_t         the noisy latent at timestep t: sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps
    z           a latent as such, noisy or not; what the VAE decodes
    eps         the noise in x_t, ~ N(0, I); what the U-Net predicts
    v           sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x0; what some networks predict instead
    t           the timestep, 0 (nearly clean) ... 999 (nearly noise)
    beta        the variance added at each timestep, (T,)
    alpha_bar   the product of 1 - beta up to t: how much of the signal's power is left
    sigma       sqrt((1 - alpha_bar) / alpha_bar): the noise's size beside a signal of size one
    snr         alpha_bar / (1 - alpha_bar) = 1 / sigma^2
    c           the condition: text states, (B, L, D), SDXL's with a pooled text and sizes; `uncond` is that of the empty or negative prompt
    w           the guidance scale: eps = eps_u + w (eps_c - eps_u)

Importing labkit imports almost nothing; each name and room below is opened when it is first used.
"""

from importlib import import_module

__version__ = "0.1.0"

NAMES = {
    "LabkitError": "labkit.errors",
    "CheckpointError": "labkit.errors",
    "LatentDiffusion": "labkit.diffusion",
    "Generation": "labkit.generation",
    "convert_checkpoint": "labkit.convert",
    "listen": "labkit.tap",
    "record": "labkit.probes.record",
    "Trace": "labkit.probes.trace",
    "Keep": "labkit.probes.keep",
    "save_trace": "labkit.probes.saved",
    "load_trace": "labkit.probes.saved",
    "open_vocabulary": "labkit.probes.open_vocabulary",
    "decode_trajectory": "labkit.probes.trajectory",
    "sweep_guidance": "labkit.probes.sweep",
    "measure_guidance": "labkit.probes.guided",
    "between_seeds": "labkit.probes.between",
    "between_prompts": "labkit.probes.between",
    "switch_prompt": "labkit.probes.decided",
    "paths": "labkit.probes.paths",
    "lens": "labkit.probes.texts",
    "alike": "labkit.probes.texts",
    "sweep": "labkit.probes.grid",
    "optimize": "labkit.packing",
    "inpaint": "labkit.editing.inpaint",
    "explore": "labkit.widgets.explorer",
    "image_to_image": "labkit.editing.image_to_image",
    "edit": "labkit.editing.prompt_to_prompt",
    "Edit": "labkit.editing.result",
    "Blend": "labkit.editing.blend",
    "align": "labkit.editing.alignment",
    "invert": "labkit.editing.inversion",
    "Inversion": "labkit.editing.inversion",
}
ROOMS = (
    *("checkpoint", "checks", "convert", "device", "diffusion", "editing", "errors", "generation", "guidance", "mixture", "models", "packing", "plots"),
    *("probes", "recipe", "samplers", "scenes", "schedule", "tap", "training", "widgets"),
)
__all__ = ["__version__", "load", *NAMES, *ROOMS]


def load(name="tabletop", device=None, dtype=None, variant=None, check=False, **one_file) -> "LatentDiffusion":  # noqa: F821
    """Open a model: "tabletop" (shipped, checked against its SHA-256 sums), a diffusers folder, one .safetensors file, or a hub id,
    with /FILE.safetensors behind it for a checkpoint of one file.

    `device`: "cpu", "cuda", "mps", or None for the best there is; `dtype`: "float32", "float16", ..., or None for what
    suits the device; `variant`: which set of weights to read where there are several, such as "fp16"; `check`: read all weights
    and refuse NaN and infinity in them (else only what must be converted is, the rest being mapped and read when it is used);
    `one_file`: for a checkpoint of one file, tokenizer=FOLDER, ema=True, prediction_type="epsilon" (labkit.models.single_file). Only a hub id
    that is not in the local cache needs the network. Raises LabkitError (CheckpointError where the files are at fault): what is
    wrong, in which file, and what to do.
    """
    from labkit.checkpoint import load_pipeline
    from labkit.device import pick_device, pick_dtype
    from labkit.diffusion import LatentDiffusion

    device = pick_device(device)
    return LatentDiffusion(**vars(load_pipeline(name, device, pick_dtype(device, dtype), variant, check, **one_file)))


def __getattr__(name: str):
    """The names above, imported when first used (PEP 562)."""
    if name in NAMES:
        value = getattr(import_module(NAMES[name]), name)
    elif name in ROOMS:
        value = import_module(f"labkit.{name}")
    else:
        raise AttributeError(f"labkit has no {name!r}; it has {', '.join(__all__)}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
