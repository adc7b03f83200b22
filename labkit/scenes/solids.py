"""Rays against the four solids, in closed form.

    sphere    |o + t d - c|^2 = r^2                     cube      the slab method (Kay & Kajiya 1986)
    cylinder  (o + t d)_xy^2 = r^2, and the top cap     cone      (o + t d)_xy^2 = k^2 (h - z)^2, k = r / h

All solids stand on the table z = 0, so their under sides are never seen: a ray that reaches one has crossed the table.
Rays are component tuples (x, y, z): tensors of shape (N,), or floats for an origin they share.
"""

import math

import torch
from torch import Tensor

Vector = tuple  # of three tensors (N,) or floats
FAR = 1e6  # the depth of a miss


def own_axes(obj, x, y) -> tuple:
    """A vector (x, y) of the table's plane, tensors or floats, in the axes of an object that is turned by its angle."""
    cos, sin = math.cos(obj.angle), math.sin(obj.angle)
    return x * cos + y * sin, y * cos - x * sin


def intersect(obj, origin: Vector, direction: Vector) -> tuple[Tensor, Tensor, Tensor]:
    """First hit of N rays with `obj`: parameter t (N,) with FAR for a miss, outward normal (3, N), part (N,) int.

    `part` numbers the smooth pieces of the surface (cube faces, cap and side), between which there is a crease.
    """
    x, y = origin[0] - obj.x, origin[1] - obj.y
    dx, dy, dz = direction
    if obj.shape == "cube":
        x, y = own_axes(obj, x, y)
        dx, dy = own_axes(obj, dx, dy)
        cos, sin = math.cos(obj.angle), math.sin(obj.angle)
        t, normal, part = _cube(x, y, origin[2] - obj.radius, dx, dy, dz, obj.radius)
        return t, torch.stack([normal[0] * cos - normal[1] * sin, normal[0] * sin + normal[1] * cos, normal[2]]), part
    if obj.shape == "sphere":
        return _sphere(x, y, origin[2] - obj.radius, dx, dy, dz, obj.radius)
    if obj.shape == "cylinder":
        return _cylinder(x, y, origin[2], dx, dy, dz, obj.radius, obj.height)
    return _cone(x, y, origin[2], dx, dy, dz, obj.radius, obj.height)


def _nearest_root(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Smaller root of a t^2 + 2 b t + c = 0, FAR where there is none in front of the origin."""
    disc = b * b - a * c
    t = (-b - disc.clamp_min(0).sqrt()) / a
    return torch.where((disc > 0) & (t > 1e-4), t, FAR)


def _sphere(x, y, z, dx, dy, dz, r):
    t = _nearest_root(dx * dx + dy * dy + dz * dz, x * dx + y * dy + z * dz, x * x + y * y + z * z - r * r)
    normal = torch.stack([x + t * dx, y + t * dy, z + t * dz]) / r
    return t, normal, torch.zeros_like(t, dtype=torch.int32)


def _cube(x, y, z, dx, dy, dz, a):
    entries, exits = [], []
    for position, slope in ((x, dx), (y, dy), (z, dz)):
        slope = torch.where(slope.abs() < 1e-9, 1e-9, slope)
        near, reach = -position / slope, a / slope.abs()
        entries.append(near - reach)
        exits.append(near + reach)
    t_in = torch.maximum(torch.maximum(entries[0], entries[1]), entries[2])
    t_out = torch.minimum(torch.minimum(exits[0], exits[1]), exits[2])
    t = torch.where((t_in < t_out) & (t_in > 1e-4), t_in, FAR)
    on_x, on_y = entries[0] == t_in, (entries[1] == t_in) & (entries[0] != t_in)
    on_z = ~(on_x | on_y)
    normal = torch.stack([-torch.sign(slope) * on for slope, on in ((dx, on_x), (dy, on_y), (dz, on_z))])
    # Opposite faces are never seen together, so the axis alone tells the visible faces apart.
    return t, normal, on_y.int() + 2 * on_z.int()


def _cylinder(x, y, z, dx, dy, dz, r, h):
    side = _nearest_root(dx * dx + dy * dy, x * dx + y * dy, x * x + y * y - r * r)
    height = z + side * dz
    side = torch.where((height >= 0) & (height <= h), side, FAR)
    cap = (h - z) / torch.where(dz.abs() < 1e-9, 1e-9, dz)
    cap_x, cap_y = x + cap * dx, y + cap * dy
    cap = torch.where((cap > 1e-4) & (cap_x * cap_x + cap_y * cap_y <= r * r), cap, FAR)
    t, on_cap = torch.minimum(side, cap), cap < side
    normal = torch.stack([(x + t * dx) / r * ~on_cap, (y + t * dy) / r * ~on_cap, on_cap.to(t.dtype)])
    return t, normal, on_cap.int()


def _cone(x, y, z, dx, dy, dz, r, h):
    k2 = (r / h) ** 2
    drop = h - z  # distance below the apex
    a = dx * dx + dy * dy - k2 * dz * dz
    b = x * dx + y * dy + k2 * drop * dz
    c = x * x + y * y - k2 * drop * drop
    disc = (b * b - a * c).clamp_min(0)
    a = torch.where(a.abs() < 1e-9, 1e-9, a)
    root = disc.sqrt()
    hits = []
    for t in ((-b - root) / a, (-b + root) / a):  # the roots swap where a < 0, and the mirrored cone above the apex is cut off
        height = z + t * dz
        hits.append(torch.where((disc > 0) & (t > 1e-4) & (height >= 0) & (height <= h), t, FAR))
    t = torch.minimum(hits[0], hits[1])
    scale = 1 / math.sqrt(1 + k2)
    px, py = x + t * dx, y + t * dy
    ring = (px * px + py * py).sqrt().clamp_min(1e-6)
    normal = torch.stack([px / ring * scale, py / ring * scale, torch.full_like(t, scale * r / h)])
    return t, normal, torch.zeros_like(t, dtype=torch.int32)
