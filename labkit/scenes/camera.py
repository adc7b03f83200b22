"""A pinhole camera that looks down at the table: pixels <-> rays, points -> pixels.

A ray is origin + depth * direction with direction . forward = 1, so that the ray parameter is the depth along the
optical axis. Screen coordinates are fractions of the picture: u to the right, v downwards, both 0..1.
"""

import math
from dataclasses import dataclass, field

import numpy as np

HALF_VIEW = 0.245  # tangent of half the field of view
TARGET_HEIGHT = 0.42  # the camera looks at this height above the middle of the table


@dataclass(frozen=True)
class Camera:
    """yaw, pitch in radians (pitch below the horizontal), distance to the target in table units."""

    yaw: float
    pitch: float
    distance: float
    origin: tuple = field(init=False)
    right: tuple = field(init=False)
    up: tuple = field(init=False)
    forward: tuple = field(init=False)

    def __post_init__(self):
        cos_yaw, sin_yaw = math.cos(self.yaw), math.sin(self.yaw)
        cos_pitch, sin_pitch = math.cos(self.pitch), math.sin(self.pitch)
        forward = (-sin_yaw * cos_pitch, cos_yaw * cos_pitch, -sin_pitch)
        object.__setattr__(self, "forward", forward)
        object.__setattr__(self, "right", (cos_yaw, sin_yaw, 0.0))
        object.__setattr__(self, "up", (-sin_yaw * sin_pitch, cos_yaw * sin_pitch, cos_pitch))
        origin = tuple(-self.distance * axis for axis in forward)
        object.__setattr__(self, "origin", (origin[0], origin[1], origin[2] + TARGET_HEIGHT))

    def project(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Screen u, v and depth of world points (N, 3); each result has shape (N,)."""
        relative = np.asarray(points, dtype=float) - np.array(self.origin)
        depth = relative @ np.array(self.forward)
        u = 0.5 + 0.5 * (relative @ np.array(self.right)) / (depth * HALF_VIEW)
        v = 0.5 - 0.5 * (relative @ np.array(self.up)) / (depth * HALF_VIEW)
        return u, v, depth


def screen_box(camera: Camera, obj) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) in screen fractions of the box that holds the solid `obj`."""
    corners = []
    turn = obj.angle if obj.shape == "cube" else 0.0
    cos, sin, r = math.cos(turn), math.sin(turn), obj.radius
    for a, b in ((-r, -r), (-r, r), (r, -r), (r, r)):
        # A round footprint reaches only 1/sqrt(2) of the way into the corners of its square: cut them by an octagon.
        feet = [(a, b)] if obj.shape == "cube" else [(a, 0.42 * b), (0.42 * a, b)]
        tops = [(0.0, 0.0)] if obj.shape == "cone" else feet
        for z, ring in ((0.0, feet), (obj.height, tops)):
            corners += [(obj.x + p * cos - q * sin, obj.y + p * sin + q * cos, z) for p, q in ring]
    u, v, _ = camera.project(np.array(corners))
    return float(u.min()), float(v.min()), float(u.max()), float(v.max())
