"""What things look like: the table and its textures, the backdrop, rubber and metal.

Textures are filtered in closed form over the pixel's footprint, so that one ray per pixel is enough: a checkerboard by
the integral of its square wave, sines by exp(-(frequency * width)^2 / 2).
"""

import torch
from torch import Tensor

from labkit.scenes import lighting
from labkit.scenes.lighting import MOODS
from labkit.scenes.scene import COLOURS
from labkit.scenes.solids import FAR, intersect

BACK = 3.3  # the table ends, and the backdrop begins, at this y
SQUARE = 0.62  # side of a checkerboard square
PLANK = 0.78  # width of a plank


class World:
    """One scene made ready for shading: light vectors and colours as tensors on a device."""

    def __init__(self, scene, device):
        self.scene, self.device = scene, device
        self.mood = MOODS[scene.light]
        self.light = lighting.key_direction(scene)
        self.key, self.sky = self._rgb(self.mood.key), self._rgb(self.mood.sky)
        self.wall_low, self.wall_high = self._rgb(self.mood.wall_low), self._rgb(self.mood.wall_high)
        self.softbox = self._rgb(self.mood.softbox)
        self.palette = torch.tensor([COLOURS[obj.colour] for obj in scene.objects], device=device).T.contiguous()  # (3, K)
        self.is_metal = torch.tensor([obj.material == "metal" for obj in scene.objects], device=device)  # (K,)
        self.is_turned = torch.tensor([obj.shape in ("cylinder", "cone") for obj in scene.objects], device=device)  # (K,)
        self.knees = torch.tensor([0.45 * obj.height for obj in scene.objects], device=device)  # (K,) below it is dim
        warm = scene.tone - 0.5
        self.plain = self._rgb((0.46 + 0.10 * warm, 0.42, 0.37 - 0.12 * warm))
        self.pale = self._rgb((0.66 + 0.06 * warm, 0.63, 0.56 - 0.08 * warm))
        self.dark = self._rgb((0.115 + 0.04 * warm, 0.12, 0.135 - 0.04 * warm))
        self.wood = self._rgb((0.40 + 0.05 * warm, 0.225, 0.105 - 0.02 * warm))
        ground = {"plain": self.plain, "checkered": (self.pale + self.dark) / 2, "wooden": self.wood}[scene.table]
        self.bounce = ground * (self.key * self.light[2] + self.sky) * 0.55  # light that the table throws back

    def _rgb(self, colour) -> Tensor:
        return torch.tensor(colour, dtype=torch.float32, device=self.device)[:, None]


def table_albedo(world: World, x: Tensor, y: Tensor, wide_x: Tensor, wide_y: Tensor) -> Tensor:
    """Reflectance (3, N) of the table, averaged over footprints of size wide_x by wide_y (N,)."""
    kind = world.scene.table
    if kind == "checkered":
        mix = 0.5 - 0.5 * _square_wave(x / SQUARE, wide_x / SQUARE) * _square_wave(y / SQUARE + 0.35, wide_y / SQUARE)
        return world.dark + (world.pale - world.dark) * mix
    if kind == "wooden":
        return world.wood * _grain(world, x, y, wide_x, wide_y)
    cloud = torch.sin(1.1 * x + 4 * world.scene.tone) * torch.sin(0.9 * y + 0.5 * x)
    return world.plain * (1 + 0.03 * cloud)


def _square_wave(x: Tensor, wide: Tensor) -> Tensor:
    """The wave +1 on [0, 1), -1 on [1, 2), averaged over x +- wide/2."""
    wide = wide.clamp_min(1e-4)
    return (_triangle_wave(x + 0.5 * wide) - _triangle_wave(x - 0.5 * wide)) / wide


def _triangle_wave(s: Tensor) -> Tensor:
    """The triangle wave, the integral of the square wave: 0 at even s, 1 at odd."""
    s = s * 0.5
    return 1 - ((s - s.floor()) * 2 - 1).abs()


def _grain(world: World, x: Tensor, y: Tensor, wide_x: Tensor, wide_y: Tensor) -> Tensor:
    """Brightness (N,) of planks along x: each its own tone, wavy grain, a dark seam between."""
    row = y / PLANK + 7 * world.scene.tone
    plank = row.floor()
    shift = torch.sin(plank * 12.9898 + 3.1 * world.scene.tone) * 43.7  # one number per plank, as good as random
    tone = 0.13 * torch.sin(shift * 7.0)
    wavy = y + 0.035 * torch.sin(1.3 * x + shift) + 0.02 * torch.sin(2.9 * x + 2 * shift)
    value = 1 + tone
    for frequency, strength, phase in ((17.0, 0.055, 1.0), (41.0, 0.05, 2.3), (73.0, 0.035, 4.1)):
        fade = torch.exp(-0.125 * (frequency * wide_y) ** 2)
        value = value + strength * fade * torch.sin(frequency * wavy + phase * shift + 0.8 * torch.sin(0.7 * x + shift))
    gap = ((row - plank) - 0.5).abs() * -PLANK + 0.5 * PLANK  # distance to the nearest seam
    seam = (0.5 - (gap - 0.011) / (wide_y + 0.006)).clamp(0, 1) * (0.022 / (wide_y + 0.012)).clamp_max(1)
    return value * (1 - 0.62 * seam)


def table_radiance(world: World, x: Tensor, y: Tensor, wide_x: Tensor, wide_y: Tensor) -> Tensor:
    """Light (3, N) that leaves the table at these points."""
    albedo = table_albedo(world, x, y, wide_x, wide_y)
    visible, open_ = 1.0, 1.0
    for obj in world.scene.objects:
        visible = visible * (1 - lighting.occlusion(obj, world.light, world.mood.spread, x, y, 0.0))
        open_ = open_ * (1 - lighting.contact(obj, x, y))
    corner = 1 - 0.30 * torch.exp((y - BACK) * 1.6)  # where the table meets the backdrop
    key = visible * lighting.pool(world.mood, x, y) * world.light[2] * (0.25 + 0.75 * open_)
    return albedo * (world.key * key + world.sky * (open_ * corner))


def wall_radiance(world: World, x: Tensor, z: Tensor) -> Tensor:
    """Light (3, N) from the backdrop: a gradient upwards with a soft glow on the side of the key light."""
    height = (z * 0.42).clamp(0, 1)
    height = height * height * (3 - 2 * height)
    side = 1 + 0.12 * torch.tanh(x * (0.5 if world.light[0] > 0 else -0.5))
    return (world.wall_low + (world.wall_high - world.wall_low) * height) * side


def sky_radiance(world: World, direction: tuple) -> Tensor:
    """The studio (3, N) that metal mirrors: backdrop behind, a darker room in front, and the key light as a softbox."""
    dx, dy, dz = direction
    height = ((dz - 0.10) / 0.55).clamp(0, 1)  # steep, so that flat metal shows a gradient too
    behind = (0.5 + 0.9 * dy).clamp(0.0, 1.0)
    room = world.sky * 0.9
    shell = room + (world.wall_low + (world.wall_high - world.wall_low) * height - room) * behind
    facing = dx * world.light[0] + dy * world.light[1] + dz * world.light[2]
    lamp = ((facing - 0.80) / 0.12).clamp(0, 1)
    overhead = ((dz - 0.55) / 0.35).clamp(0, 1)  # a broad pale ceiling
    return shell + world.softbox * (lamp * lamp * (3 - 2 * lamp)) + world.sky * (0.8 * overhead)


def ground_radiance(world: World, origin: tuple, direction: tuple, blur: float) -> Tensor:
    """What (3, N) secondary rays see where they meet no solid: table, backdrop or studio."""
    dx, dy, dz = direction
    t = -origin[2] / torch.where(dz < -1e-3, dz, -1e-3)
    x, y = origin[0] + t * dx, origin[1] + t * dy
    wide = blur * t
    table = table_radiance(world, x.clamp(-9, 9), y.clamp(-9, BACK), wide, wide / (-dz).clamp_min(0.15))
    table = table * (1.15 / (1 + 0.14 * (x * x + y * y)))  # the room around is darker: flat metal shows a gradient
    fade = ((-dz - 0.02) / 0.2).clamp(0, 1) * (1 - ((y - BACK + 0.4) / 0.8).clamp(0, 1))
    return torch.lerp(sky_radiance(world, direction), table, fade)


def solid_radiance(world: World, owner: Tensor, point: tuple, normal: Tensor, view: Tensor) -> Tensor:
    """Light (3, N) that leaves objects `owner` (N,) towards the eye; `view` (3, N) are unit directions away from it."""
    colour = world.palette.index_select(1, owner)
    diffuse, visible = _irradiance(world, owner, point, normal, shadows=True)
    facing = view[0] * normal[0] + view[1] * normal[1] + view[2] * normal[2]  # negative: seen from outside
    mirror = view - 2 * facing * normal
    light = world.light
    shine = (mirror[0] * light[0] + mirror[1] * light[1] + mirror[2] * light[2]).clamp(0, 1)
    rim = (1 + facing).clamp(0, 1)
    rim = rim * rim * rim
    gloss = 0.09 * _power(shine, 3)
    radiance = colour * diffuse + world.key * (gloss * visible) + world.sky * (0.10 * rim)  # rubber
    at = world.is_metal.index_select(0, owner).nonzero()[:, 0]
    if len(at):
        seen = _mirrored(world, owner[at], tuple(axis[at] for axis in point), mirror.index_select(1, at))
        colour, rim = colour.index_select(1, at), rim[at]
        tint = colour + (1 - colour) * (0.03 + 0.30 * rim)  # Schlick 1994
        streak = _streak(world, owner[at], normal.index_select(1, at), view.index_select(1, at))
        spark = world.softbox * ((1.6 * _power(shine[at], 7) + 0.30 * streak) * visible[at]) * (0.35 + 0.65 * tint)
        radiance.index_copy_(1, at, colour * (0.30 * diffuse.index_select(1, at)) + tint * (0.85 * seen) + spark)
    return radiance


def _streak(world: World, owner: Tensor, normal: Tensor, view: Tensor) -> Tensor:
    """Upright highlight (N,) of the key light on turned metal (cylinder, cone): only the azimuths have to agree."""
    hx, hy = world.light[0] - view[0], world.light[1] - view[1]
    upright = (normal[0] * normal[0] + normal[1] * normal[1]).sqrt()  # 0 on a cap
    agree = (normal[0] * hx + normal[1] * hy) / (upright.clamp_min(1e-3) * (hx * hx + hy * hy).sqrt())
    return world.is_turned.index_select(0, owner) * upright * _power(agree.clamp(0, 1), 5)


def _power(x: Tensor, doublings: int) -> Tensor:
    """x to the power 2^doublings; far faster than pow."""
    for _ in range(doublings):
        x = x * x
    return x


def _mirrored(world: World, owner: Tensor, point: tuple, mirror: Tensor) -> Tensor:
    """What (3, N) rays that leave objects `owner` meet: other objects, in plain diffuse light, or the surroundings."""
    seen = ground_radiance(world, point, mirror, 0.05)
    nearest = torch.full_like(mirror[0], FAR)
    for j, other in enumerate(world.scene.objects):
        t, normal, _ = intersect(other, point, tuple(mirror))
        hit = ((t < nearest) & (owner != j)).nonzero()[:, 0]
        if len(hit):
            nearest[hit] = t[hit]
            spot = tuple(p[hit] + t[hit] * m[hit] for p, m in zip(point, mirror))
            light, _ = _irradiance(world, torch.full_like(hit, j), spot, normal[:, hit], shadows=False)
            seen[:, hit] = world.palette[:, j : j + 1] * light
    return seen


def _irradiance(world: World, owner: Tensor, point: tuple, normal: Tensor, shadows: bool) -> tuple[Tensor, Tensor]:
    """Light (3, N) that falls on objects `owner` and the share (N,) of the key light that others leave."""
    x, y, z = point
    light = world.light
    lambert = (normal[0] * light[0] + normal[1] * light[1] + normal[2] * light[2] + 0.06).clamp_min(0) / 1.06
    visible, open_ = torch.ones_like(x), torch.ones_like(x)
    if shadows and len(world.scene.objects) > 1:
        for j, other in enumerate(world.scene.objects):
            is_other = owner != j
            visible = visible * (1 - is_other * lighting.occlusion(other, light, world.mood.spread, x, y, z))
            open_ = open_ * (1 - is_other * lighting.blocked(other, x, y, z, normal))
    upward = 0.5 + 0.5 * normal[2]
    foot = 0.45 + 0.55 * (z / world.knees.index_select(0, owner)).clamp(0, 1)  # little light gets under an object
    ambient = world.sky * (upward * open_ * (0.55 + 0.45 * foot)) + world.bounce * ((1 - upward) * foot * open_)
    return world.key * (lambert * visible * lighting.pool(world.mood, x, y)) + ambient, visible
