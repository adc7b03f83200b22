"""Light on the table: three moods, soft shadows and contact darkening, all in closed form.

The key light is a small disc at infinity. A vertical solid of height H throws on the plane through a point p the hull of
its section there and of its top, shifted by l (H - z), where l = -L_xy / L_z. With s the signed distance to that hull
and g the height of what blocks the light above p, the share of the disc that is hidden is about

    occlusion = smoothstep(0.5 - s / (2 w)),      w = spread * g

sharp at the foot of an object and soft far from it (percentage-closer soft shadows, Fernando 2005, without samples).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from labkit.scenes.solids import own_axes


@dataclass(frozen=True)
class Mood:
    """Linear radiances (R, G, B) of one kind of light."""

    key: tuple  # of the key light on a surface that faces it
    sky: tuple  # of the ambient light from above
    wall_low: tuple  # the backdrop at table height
    wall_high: tuple  # and two units above
    softbox: tuple  # what metal mirrors where the key light is
    spread: float  # angular radius of the key light
    pool: float  # 0: even light; 1: a lamp that lights a pool on the table


MOODS = {
    "day": Mood((1.02, 0.97, 0.90), (0.42, 0.47, 0.53), (0.80, 0.82, 0.82), (0.40, 0.52, 0.68), (2.6, 2.5, 2.4), 0.13, 0.0),
    "sunset": Mood((1.62, 1.05, 0.58), (0.40, 0.36, 0.44), (0.95, 0.50, 0.26), (0.36, 0.24, 0.42), (3.2, 1.9, 0.9), 0.10, 0.0),
    "night": Mood((0.98, 0.84, 0.65), (0.135, 0.175, 0.28), (0.050, 0.072, 0.16), (0.010, 0.015, 0.045), (1.7, 1.4, 1.0), 0.16, 1.0),
}


def key_direction(scene) -> tuple[float, float, float]:
    """Unit vector from the table towards the key light."""
    flat = math.cos(scene.elevation)
    return flat * math.cos(scene.azimuth), flat * math.sin(scene.azimuth), math.sin(scene.elevation)


def pool(mood: Mood, x: Tensor, y: Tensor) -> Tensor | float:
    """Brightness of the key light over the table: 1 but for a lamp, whose light falls off from the middle."""
    if mood.pool == 0:
        return 1.0
    fall = 1 + 0.22 * (x * x + 0.8 * y * y)
    return 1.30 / (fall * fall.sqrt())


def occlusion(obj, light: tuple, spread: float, x: Tensor, y: Tensor, z: Tensor | float) -> Tensor:
    """Share (N,) of the key light that `obj` hides from the points."""
    u, v = x - obj.x, y - obj.y
    if obj.shape == "sphere":
        w = obj.radius - z
        along = u * -light[0] + v * -light[1] + w * light[2]  # to the point of the ray that is nearest to the centre
        squared = u * u + v * v + w * w - along * along
        distance = squared.clamp_min(1e-8).sqrt() - obj.radius
        distance = torch.where(along > 0, distance, 1.0)
        return _smooth(distance, spread * along)
    slope = math.hypot(light[0], light[1]) / light[2]
    ex, ey = -light[0] / (slope * light[2]), -light[1] / (slope * light[2])  # the way shadows fall
    above = obj.height - z
    above = above.clamp_min(0) if isinstance(above, Tensor) else above
    length = slope * above
    along, across = u * ex + v * ey, (u * ey - v * ex).abs()
    if obj.shape == "cylinder":
        distance = ((along - _clip(along, length)) ** 2 + across * across).clamp_min(1e-8).sqrt() - obj.radius
    elif obj.shape == "cone":
        distance = _cone_distance(along, across, length, obj.radius / obj.height * above)
    else:
        distance = _cube_distance(obj, u, v, ex, ey, length)
    if isinstance(z, Tensor):
        distance = torch.maximum(distance, z - obj.height)
    return _smooth(distance, spread * _clip(along, length) / (slope * light[2]))


def _clip(along: Tensor, length: Tensor | float) -> Tensor:
    along = along.clamp_min(0)
    return torch.minimum(along, length) if isinstance(length, Tensor) else along.clamp_max(length)


def _cone_distance(along, across, length, base):
    """Signed distance to the hull of a disc of radius `base` at 0 and a point at `length`: a drop."""
    if not isinstance(length, Tensor):
        length, base = torch.as_tensor(length), torch.as_tensor(base)
    sine = (base / length.clamp_min(1e-4)).clamp_max(1.0)
    cosine = (1 - sine * sine).sqrt()
    from_tip = length - along
    line = across * cosine - from_tip * sine
    round_ = (along * along + across * across).clamp_min(1e-8).sqrt() - base
    return torch.where(from_tip * cosine + across * sine > length * cosine, round_, line)


def _cube_distance(obj, u, v, ex, ey, length):
    """Signed distance to the hull of a turned square and its copy shifted by `length` (e): a hexagon of three strips."""
    a = obj.radius
    p, q = own_axes(obj, u, v)
    sp, sq = own_axes(obj, ex, ey)
    strips = [(p * sq - q * sp).abs() - a * (abs(sp) + abs(sq))]
    for position, shift in ((p, sp), (q, sq)):
        position = position if shift >= 0 else -position
        strips += [position - (length * abs(shift) + a), -position - a]
    distance = strips[0]
    for strip in strips[1:]:
        distance = torch.maximum(distance, strip)
    return distance


def _smooth(distance: Tensor, width: Tensor) -> Tensor:
    share = (0.5 - distance / (2 * width.clamp_min(0.006))).clamp(0, 1)
    return share * share * (3 - 2 * share)


def contact(obj, x: Tensor, y: Tensor) -> Tensor:
    """Share (N,) of the sky that `obj` hides from points of the table near its foot."""
    u, v = x - obj.x, y - obj.y
    if obj.shape == "sphere":
        squared = u * u + v * v + obj.radius**2
        return 0.9 * obj.radius**3 / (squared * squared.sqrt())
    if obj.shape == "cube":
        p, q = (side.abs() - obj.radius for side in own_axes(obj, u, v))
        gap = (p.clamp_min(0) ** 2 + q.clamp_min(0) ** 2).sqrt()
    else:
        gap = ((u * u + v * v).sqrt() - obj.radius).clamp_min(0)
    lean = 0.38 if obj.shape == "cone" else 0.55  # a cone's side leans away and hides less
    return lean * torch.exp(gap * (-1 / (0.36 * obj.height)))


def blocked(obj, x: Tensor, y: Tensor, z: Tensor, normal: Tensor) -> Tensor:
    """Share (N,) of the sky hidden by `obj` from points with these normals (3, N): a sphere's form factor, R^2/d^2 cos."""
    u, v, w = obj.x - x, obj.y - y, 0.5 * obj.height - z
    squared = (u * u + v * v + w * w).clamp_min(1e-4)
    cosine = (u * normal[0] + v * normal[1] + w * normal[2]) / squared.sqrt()
    return (cosine + 0.2).clamp_min(0) * (0.75 * obj.radius**2 / squared).clamp_max(0.7)
