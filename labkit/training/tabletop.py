"""The stages that make the shipped model, one after the other: clip, vae, diffusion, decoder; and their assembly.

Each stage keeps its state in a folder of its own (runs/tabletop/clip, ...), resumes from there, and reads what it needs of
the stages before. `export` writes the averaged weights as a model folder that labkit and diffusers open.
"""
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from labkit.checkpoint import load_pipeline, save_pipeline, write_sums
from labkit.device import pick_device
from labkit.diffusion import LatentDiffusion
from labkit.errors import LabkitError
from labkit.models.clip import CLIPText
from labkit.models.config import TABLETOP_TEXT, TABLETOP_UNET, TABLETOP_VAE, UNetConfig, VAEConfig
from labkit.models.files import write_safetensors
from labkit.models.sources import resolve
from labkit.models.tokenizer import Tokenizer, build_vocabulary
from labkit.models.tower import ImageTower
from labkit.models.unet import UNet
from labkit.models.vae import VAE
from labkit.scenes.captions import vocabulary
from labkit.schedule import ScheduleConfig
from labkit.training import clip, diffusion, verifier
from labkit.training import vae as autoencoding
from labkit.training.vae import VAELoss
from labkit.training.data import SHOWN, World, renders, scenes
from labkit.training.lessons import LESSONS, Course, Timetable
from labkit.training.loop import LoopConfig, run
from labkit.training.measures import load_tower
from labkit.training.widen import obstacle, widen

STAGES = ("clip", "vae", "diffusion", "decoder")


@dataclass(frozen=True)
class Preset:
    """Everything that decides what comes out."""

    world: World = World(counts=(1, 2, 3, 4), styles=("photo", "photo", "photo", "photo", "sketch"))
    pictures: int = 40_000
    clip: LoopConfig | None = LoopConfig(steps=2400, batch_size=64, lr=1e-3, warmup=100)
    # None: the autoencoder of `start` stays, and its latents
    vae: LoopConfig | None = LoopConfig(steps=14_000, batch_size=4, lr=1e-3, cooldown=0.35, ema_decay=0.998, mixed_precision="bf16")
    vae_loss: VAELoss = VAELoss(adversarial_from=11_500)
    diffusion: LoopConfig = LoopConfig(steps=9000, batch_size=32, lr=8e-4, cooldown=0.35, mixed_precision="bf16")
    decoder: LoopConfig | None = None  # the decoder alone, trained on while the latents stay what they are; None: it stays as the vae stage leaves it
    unet_config: UNetConfig = TABLETOP_UNET
    vae_config: VAEConfig = TABLETOP_VAE
    schedule: ScheduleConfig = ScheduleConfig(timestep_spacing="trailing", steps_offset=0)
    gamma: float = 5.0  # the SNR's bounds in the loss's weights (training/diffusion.py)
    floor: float = 0.0
    course: Course | None = None  # what the U-Net learns when (training/lessons.py); None: everything, always
    guidance: float = 4.0  # the scale that the shipped model uses unless told otherwise
    name: str = "tabletop"
    start: str | None = None  # a model folder whose weights are trained on, the U-Net's if it is built the same or narrower (widen.py); None: from nothing

    def __post_init__(self) -> None:
        if self.start is None and None in (self.clip, self.vae):
            raise LabkitError("a preset that does not train a text encoder and an autoencoder needs a model to take them from: give start, or clip and vae")

    @property
    def stages(self) -> tuple[str, ...]:
        """What is trained."""
        return tuple(stage for stage in STAGES if getattr(self, stage) is not None)


ONE_BY_ONE = Course((  # where things stand, of what they are, how many; then all of it
    (0.0, {"places": 0.8, "place": 0.1, "all": 0.1}),
    (0.22, {"material": 0.6, "places": 0.15, "relation": 0.15, "number": 0.1}),
    (0.31, {"number": 0.4, "material": 0.35, "relation": 0.15, "places": 0.1}),
    (0.41, {"relation": 0.25, "number": 0.25, "two": 0.15, "material": 0.15, "place": 0.05, "places": 0.05, "all": 0.1}),
    (0.55, {"all": 0.35, "early": 0.1, "relation": 0.15, "number": 0.15, "two": 0.1, "material": 0.1, "place": 0.05}),
))
TWO_AND_MORE = Course((  # on from there: of two shapes one was drawn twice, of three or four too many, and cubes were lumps
    (0.0, {"number": 0.25, "two": 0.25, "fine": 0.25, "relation": 0.05, "material": 0.05, "all": 0.15}),
    (0.6, {"all": 0.3, "fine": 0.2, "number": 0.25, "two": 0.15, "relation": 0.05, "early": 0.05}),
))
FROM_NOTHING = Course(((0.0, {"all": 1.0}), *((0.3 + 0.4 * begin, shares) for begin, shares in ONE_BY_ONE.plan), *((0.7 + 0.3 * begin, shares) for begin, shares in TWO_AND_MORE.plan)))
APART = replace(SHOWN, hidden=0.05)  # what is to be counted hides next to nothing of each other
FINE = VAELoss(squared=50.0, structural=1.0, perceptual=0.5, adversarial=0.0)  # reconstruct; an opponent makes edges that were not there


PRESETS = {
    # the shipped model from nothing, for a GPU: all its runs in one
    "tabletop": Preset(
        world=APART,
        vae=LoopConfig(steps=20_000, batch_size=8, lr=1e-3, cooldown=0.5, ema_decay=0.998, mixed_precision="bf16"),
        vae_loss=FINE,
        diffusion=LoopConfig(steps=40_000, batch_size=64, lr=6e-4, cooldown=0.35, mixed_precision="bf16"),
        floor=1.0,
        course=FROM_NOTHING,
    ),
    # the shipped model, trained on: the autoencoder for what is fine, without an opponent; then the U-Net, made wider, on its latents, which are near those that it knows
    "further": Preset(
        world=APART,
        pictures=30_000,
        clip=None,
        vae=LoopConfig(steps=7000, batch_size=8, lr=1e-3, warmup=100, cooldown=0.6, ema_decay=0.998, mixed_precision="bf16"),
        vae_loss=replace(FINE, perceptual_from=0, full_from=0),
        diffusion=LoopConfig(steps=9800, batch_size=64, lr=6e-4, warmup=200, cooldown=0.3, mixed_precision="bf16"),
        floor=1.0,
        course=TWO_AND_MORE,
        start="tabletop",
    ),
    # a quarter of an hour of two cores, for laptops (figures in data/README.md): a U-Net of half the width, attention from 8x8 latents down, learns single objects
    # from nothing, as Stable Diffusion's did: between an autoencoder and a text encoder that were there
    "tabletop-mini": Preset(
        world=World(counts=(1,)),
        pictures=6000,
        clip=None,
        vae=None,
        diffusion=LoopConfig(steps=4000, batch_size=16, lr=1e-3, warmup=100, cooldown=0.5, ema_decay=0.995, mixed_precision="bf16"),
        unet_config=replace(TABLETOP_UNET, block_out_channels=(32, 64, 128), cross_attention=(False, True, True)),
        name="tabletop-mini",
        start="tabletop",
    ),
    # a few minutes from end to end, to see the machinery work; its pictures are coloured blobs
    "smoke": Preset(
        pictures=500,
        clip=LoopConfig(steps=20, batch_size=16, lr=1e-3, warmup=5),
        vae=LoopConfig(steps=20, batch_size=4, lr=1e-3, warmup=5),
        vae_loss=VAELoss(adversarial_from=15, full_from=10),
        diffusion=LoopConfig(steps=20, batch_size=8, lr=1e-3, warmup=5),
    ),
}


def train(stage: str, folder: str | Path, preset: Preset = PRESETS["tabletop"], device: str | None = None) -> None:
    """Train one stage, or "all" that the preset has and then export, in `folder`; goes on where an earlier run stopped.

    "verifier" trains the judge of pictures, which is no part of the model, and leaves it in folder/judge.
    """
    if stage not in (*STAGES, "verifier", "all"):
        raise LabkitError(f"there is no training stage {stage!r}; choose from {', '.join(STAGES)}, verifier or all")
    folder = Path(folder)
    if stage == "verifier":
        verifier.main(folder, folder / "judge", device=device)
        return
    idle = {"clip": "text encoder by contrast", "vae": "autoencoder", "decoder": "decoder apart"}
    if stage in idle and stage not in preset.stages:
        raise LabkitError(f"the preset does not train the {idle[stage]}; train {', '.join(preset.stages)} or all")
    for name in preset.stages if stage == "all" else (stage,):
        {"clip": train_clip, "vae": train_vae, "diffusion": train_diffusion, "decoder": train_decoder}[name](folder, preset, device)
    if stage == "all":
        export(folder, preset, folder / "model")


def train_clip(folder: Path, preset: Preset, device: str | None) -> None:
    torch.manual_seed(preset.clip.seed)
    tokenizer = build_tokenizer()
    text, tower = text_encoder(tokenizer), ImageTower()
    if preset.start is not None:
        text = deepcopy(load_pipeline(preset.start).text_encoder).train().requires_grad_(True)
        tower = image_tower(folder, preset).train().requires_grad_(True)
    recipe = clip.recipe(text, tower, tokenizer, scenes(preset.world, 0, preset.pictures), pictures(folder, preset), LESSONS["all"].whereabouts)
    run(recipe, preset.clip, folder / "clip", device)


def train_vae(folder: Path, preset: Preset, device: str | None) -> None:
    torch.manual_seed(preset.vae.seed)
    tower = image_tower(folder, preset)
    vae = VAE(preset.vae_config) if preset.start is None else deepcopy(load_pipeline(preset.start).vae).train().requires_grad_(True)
    run(autoencoding.recipe(vae, tower, pictures(folder, preset), preset.vae_loss), preset.vae, folder / "vae", device)


def train_diffusion(folder: Path, preset: Preset, device: str | None) -> None:
    torch.manual_seed(preset.diffusion.seed)
    vae, start = autoencoder(folder, preset), None if preset.start is None else load_pipeline(preset.start)
    on = start is not None and obstacle(start.unet.config, preset.unet_config) is None
    unet = widen(start.unet, preset.unet_config) if on else diffusion.start_quiet(UNet(preset.unet_config))
    text = deepcopy(start.text_encoder) if preset.clip is None else take(folder / "clip", text_encoder=text_encoder(build_tokenizer()))[0]
    scale = vae.config.scaling_factor if preset.vae is None else None  # the one that the U-Net knows, or the one to measure
    latents = diffusion.latents(vae, pictures(folder, preset), folder / "latents.safetensors", device, scale)
    shown = scenes(preset.world, 0, preset.pictures)
    timetable = preset.course and Timetable(preset.course, shown, preset.diffusion.steps, preset.schedule.num_train_timesteps)
    recipe = diffusion.recipe(unet, text, build_tokenizer(), vae, latents, shown, preset.schedule, preset.gamma, preset.floor, timetable)
    with diffusion.attention_for(recipe.players[0].objective, preset.diffusion, pick_device(device)):
        run(recipe, preset.diffusion, folder / "diffusion", device)


def train_decoder(folder: Path, preset: Preset, device: str | None) -> None:
    """Only what follows the latents, which the U-Net knows as they are. Stable Diffusion's second autoencoder came about so (ft-MSE, Stability AI 2022)."""
    torch.manual_seed(preset.decoder.seed)
    vae = autoencoder(folder, preset).train()
    for part in (vae.post_quant_conv, vae.decoder):
        part.requires_grad_(True)
    loss = replace(preset.vae_loss, perceptual_from=0, adversarial=0.0, full_from=0)
    run(autoencoding.recipe(vae, image_tower(folder, preset), pictures(folder, preset), loss), preset.decoder, folder / "decoder", device)


def autoencoder(folder: Path, preset: Preset) -> VAE:
    """The one whose latents the U-Net learns."""
    if preset.vae is None:
        return deepcopy(load_pipeline(preset.start).vae).eval().requires_grad_(False)
    return take(folder / "vae", vae=VAE(preset.vae_config))[0]


def image_tower(folder: Path, preset: Preset) -> ImageTower:
    """The one that losses and distances are taken by: of a model that is trained on, its own, so that they can be compared."""
    if preset.start is None:
        return take(folder / "clip", image_tower=ImageTower())[0]
    return load_tower(resolve(preset.start) / "image_tower" / "model.safetensors")


def pictures(folder: Path, preset: Preset):
    return renders(preset.world, 0, preset.pictures, folder / "data")


def build_tokenizer() -> Tokenizer:
    """CLIP's tokenizer over this world's words: each is one token."""
    return Tokenizer(*build_vocabulary(vocabulary()), max_length=TABLETOP_TEXT.max_position_embeddings)


def text_encoder(tokenizer: Tokenizer) -> CLIPText:
    return CLIPText(replace(TABLETOP_TEXT, vocab_size=len(tokenizer)))


def take(folder: Path, **modules: nn.Module) -> list[nn.Module]:
    """Fill modules with the averaged weights of a finished stage, frozen and in evaluation mode."""
    path = folder / "checkpoint.pt"
    if not path.exists():
        raise LabkitError(f"{path} does not exist; train that stage first: python -m labkit train {folder.name} --folder {folder.parent}")
    saved = torch.load(path, map_location="cpu", weights_only=True)["ema"]
    for name, module in modules.items():
        module.load_state_dict(saved[name])
        module.eval().requires_grad_(False)
    return list(modules.values())


def export(folder: str | Path, preset: Preset, target: str | Path) -> None:
    """Write the averaged weights of all stages to `target`: a model folder in float16, the image tower beside it, SHA-256 sums."""
    folder, target = Path(folder), Path(target)
    tokenizer = build_tokenizer()
    tower = image_tower(folder, preset)
    scale = diffusion.saved_scale(folder / "latents.safetensors")
    vae = autoencoder(folder, preset) if preset.decoder is None else take(folder / "decoder", vae=VAE(preset.vae_config))[0]
    vae.config = replace(vae.config, scaling_factor=scale)
    unet, text = take(folder / "diffusion", unet=UNet(preset.unet_config), text_encoder=text_encoder(tokenizer))
    defaults = {"steps": 20, "guidance": preset.guidance, "sampler": "ddim"}
    metadata = {"name": preset.name, "defaults": defaults, "vocabulary": list(vocabulary()), "training": asdict(preset.world) | {"pictures": preset.pictures}}
    lab = LatentDiffusion(unet, vae, text, tokenizer, preset.schedule, name=preset.name, metadata=metadata)
    save_pipeline(lab, target, dtype=torch.float16, overwrite=True)
    write_safetensors(tower.state_dict(), target / "image_tower" / "model.safetensors", torch.float16)
    write_sums(target)
