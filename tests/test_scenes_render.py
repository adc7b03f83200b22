"""The ray tracer against geometry worked out by hand: masks, depth, normals, colours, shadows, independence of the batch."""

import colorsys
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from labkit.errors import LabkitError
from labkit.scenes.camera import HALF_VIEW, TARGET_HEIGHT
from labkit.scenes.render import render, render_many
from labkit.scenes.scene import COLOURS, LIGHTS, MATERIALS, SHAPES, STYLES, TABLES, Object, Scene, scene_from_seed

SPHERE = Scene((Object("sphere", "red", "large", "rubber", 0.3, -0.2),))
CUBE = Scene((Object("cube", "red", "large", "rubber", 0.2, 0.1, angle=0.4),))


def pinhole(scene: Scene, size: int):
    """Camera centre and unit-depth rays (size, size, 3), built anew from the definition: yaw, then pitch, then pixels."""
    forward = np.array([-math.sin(scene.yaw) * math.cos(scene.pitch), math.cos(scene.yaw) * math.cos(scene.pitch), -math.sin(scene.pitch)])
    right = np.array([math.cos(scene.yaw), math.sin(scene.yaw), 0.0])
    up = np.cross(right, forward)
    centre = np.array([0, 0, TARGET_HEIGHT]) - scene.distance * forward
    grid = (np.arange(size) + 0.5) / size * 2 - 1
    rays = forward + HALF_VIEW * (grid[None, :, None] * right - grid[:, None, None] * up)
    return centre, rays


def test_sphere_depth_normal_and_mask():
    size, obj = 96, SPHERE.objects[0]
    seen = render(SPHERE, size)
    centre, rays = pinhole(SPHERE, size)
    middle = np.array([obj.x, obj.y, obj.radius])
    a, b = (rays**2).sum(-1), ((centre - middle) * rays).sum(-1)
    disc = b**2 - a * (((centre - middle) ** 2).sum() - obj.radius**2)
    depth = np.where(disc > 0, (-b - np.sqrt(np.abs(disc))) / a, np.inf)
    inside = seen.masks[0, 0].numpy() == 1
    assert inside.sum() > 600 and np.isfinite(depth[inside]).all()
    assert np.abs(seen.depth[0].numpy()[inside] - depth[inside]).max() < 2e-3
    normals = (centre + depth[..., None] * rays - middle) / obj.radius
    assert np.abs(seen.normals[0].permute(1, 2, 0).numpy()[inside] - normals[inside]).max() < 5e-3
    # The mask's edge pixels: coverage by brute force, 16 x 16 rays in each.
    _, fine = pinhole(SPHERE, size * 16)
    a, b = (fine**2).sum(-1), ((centre - middle) * fine).sum(-1)
    hit = b**2 - a * (((centre - middle) ** 2).sum() - obj.radius**2) > 0
    coverage = hit.reshape(size, 16, size, 16).mean((1, 3))
    assert np.abs(seen.masks[0, 0].numpy() - coverage).max() < 0.2
    assert abs(seen.masks[0, 0].numpy().sum() - coverage.sum()) < 0.002 * coverage.sum()


def test_cube_depth_and_normals():
    size, obj = 96, CUBE.objects[0]
    seen = render(CUBE, size)
    centre, rays = pinhole(CUBE, size)
    points = centre + seen.depth[0].numpy()[..., None] * rays
    inside = seen.masks[0, 0].numpy() == 1
    c, s = math.cos(obj.angle), math.sin(obj.angle)
    turn = np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])
    local = (points[inside] - [obj.x, obj.y, obj.radius]) @ turn.T
    assert np.abs(np.abs(local).max(-1) - obj.radius).max() < 2e-3, "points lie on the surface"
    normals = seen.normals[0].permute(1, 2, 0).numpy()[inside] @ turn.T
    face = np.abs(local).argmax(-1)
    clear = np.sort(np.abs(local), -1)[:, 1] < 0.98 * obj.radius  # off the creases
    assert np.allclose(normals[clear, face[clear]], np.sign(local[clear, face[clear]]), atol=1e-5)
    assert len(np.unique(face)) == 3, "top and two sides are in view"


@pytest.mark.parametrize("shape", ["cylinder", "cone"])
def test_round_solids_lie_on_their_surface(shape):
    scene = Scene((Object(shape, "red", "large", "rubber", -0.3, 0.2),))
    size, obj = 96, scene.objects[0]
    seen = render(scene, size)
    centre, rays = pinhole(scene, size)
    points = (centre + seen.depth[0].numpy()[..., None] * rays)[seen.masks[0, 0].numpy() == 1]
    ring, z = np.hypot(points[:, 0] - obj.x, points[:, 1] - obj.y), points[:, 2]
    side = ring - obj.radius if shape == "cylinder" else ring - obj.radius * (1 - z / obj.height)
    off = np.minimum(np.abs(side), np.abs(z - obj.height) + np.maximum(ring - obj.radius, 0))
    assert off.max() < 3e-3 and z.min() > -1e-3 and z.max() < obj.height + 1e-3
    # A normal is what the depth's slope says: neighbours lie in the plane across it.
    normals = seen.normals[0].permute(1, 2, 0).numpy()[seen.masks[0, 0].numpy() == 1]
    assert np.allclose(np.linalg.norm(normals, axis=-1), 1, atol=1e-5)
    if shape == "cone":
        apex = np.array([obj.x, obj.y, obj.height])
        assert np.abs(((points - apex) * normals).sum(-1)).max() < 3e-3, "the apex lies in every tangent plane"


def test_table_and_backdrop_are_flat():
    seen = render(CUBE, 64)
    centre, rays = pinhole(CUBE, 64)
    points = centre + seen.depth[0].numpy()[..., None] * rays
    assert abs(points[-1, :, 2]).max() < 1e-3 and np.ptp(points[0, :, 1]) < 1e-3
    assert (seen.normals[0, 2, -1] == 1).all() and (seen.normals[0, 1, 0] == -1).all()


def test_masks_share_each_pixel():
    scenes = [scene_from_seed(seed, counts=(2, 3, 4)) for seed in range(12)]
    seen = render(scenes, 64)
    assert seen.masks.shape == (12, 4, 64, 64) and seen.image.shape == (12, 3, 64, 64)
    assert seen.masks.min() >= 0 and seen.masks.sum(1).max() <= 1 + 1e-6
    for b, scene in enumerate(scenes):
        nearest = max(scene.objects, key=lambda obj: -obj.y)
        k = scene.objects.index(nearest)
        u, v, _ = scene.camera().project(np.array([[nearest.x, nearest.y, 0.5 * nearest.height]]))
        assert seen.masks[b, k, int(v[0] * 64), int(u[0] * 64)] == 1, "the middle of the nearest object belongs to it"
        assert (seen.masks[b, len(scene.objects) :] == 0).all()


def test_left_is_left_and_front_is_below():
    left = Object("sphere", "red", "small", "rubber", -0.9, 0.0)
    right, near = replace(left, x=0.9), replace(left, x=0.9, y=-1.2)
    masks = render([Scene((left, right)), Scene((left, near))], 64).masks
    rows, columns = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    centre = lambda mask, axis: (mask * axis).sum() / mask.sum()  # noqa: E731
    assert centre(masks[0, 0], columns) < 24 < 40 < centre(masks[0, 1], columns)
    assert centre(masks[1, 1], rows) > centre(masks[1, 0], rows) + 8


def test_same_picture_in_any_batch_and_again():
    scenes = [scene_from_seed(seed, styles=STYLES) for seed in range(6)]
    together, again = render(scenes, 64), render(scenes, 64)
    for name in ("image", "masks", "depth", "normals"):
        assert torch.equal(getattr(together, name), getattr(again, name))
    for b, scene in enumerate(scenes):
        alone = render(scene, 64)
        assert torch.equal(alone.image[0], together.image[b]) and torch.equal(alone.depth[0], together.depth[b])


def test_render_many_is_render():
    scenes = [scene_from_seed(seed) for seed in range(40)]
    pictures = render_many(scenes, workers=1, size=32)
    assert pictures.shape == (40, 32, 32, 3) and pictures.dtype == np.uint8
    expected = (render(scenes[35], 32).image[0] * 255).round().permute(1, 2, 0).numpy()
    assert np.array_equal(pictures[35], expected)
    assert np.array_equal(render_many(scenes, workers=2, size=32), pictures)


def mean_colour(scene: Scene) -> np.ndarray:
    """Mean sRGB (3,) over the pixels that are wholly the first object's."""
    seen = render(scene, 64)
    inside = seen.masks[0, 0] == 1
    return seen.image[0][:, inside].mean(1).numpy()


@pytest.mark.parametrize("style", STYLES)
def test_hue_is_that_of_the_word(style):
    hues = {"red": 0.0, "orange": 0.07, "yellow": 0.15, "green": 0.34, "cyan": 0.50, "blue": 0.63, "purple": 0.76}
    for colour, hue in hues.items():
        for shape in SHAPES:
            found, saturation, _ = colorsys.rgb_to_hsv(*mean_colour(Scene((Object(shape, colour, "large", "rubber", 0, 0, 0.5),), style=style)))
            nearest = min(hues, key=lambda name: abs((found - hues[name] + 0.5) % 1 - 0.5))
            assert nearest == colour and saturation > 0.3, (shape, colour, nearest, found)
    assert colorsys.rgb_to_hsv(*mean_colour(Scene((Object("cube", "white", "large", "rubber", 0, 0, 0.5),), style=style)))[1] < 0.15


@pytest.mark.parametrize("light", LIGHTS)
@pytest.mark.parametrize("style", STYLES)
def test_colours_stay_apart_under_every_light(light, style):
    for material in MATERIALS:
        lab = {}
        for colour in COLOURS:
            rgb = mean_colour(Scene((Object("cylinder", colour, "large", material, 0, 0),), light=light, style=style))
            linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
            xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear
            f = np.cbrt(xyz / [0.9505, 1.0, 1.089])
            lab[colour] = np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])
        for a in lab:
            for b in lab:
                if a < b:
                    assert np.linalg.norm(lab[a] - lab[b]) > 12, (light, style, material, a, b)


def test_shadow_falls_away_from_the_light():
    for azimuth, side in ((math.pi, 1), (0.0, -1)):  # light from the left: shadow on the right
        lit = render(replace(SPHERE, azimuth=azimuth, elevation=0.6, objects=(replace(SPHERE.objects[0], x=0.0),)), 64).image[0]
        empty = render(replace(SPHERE, azimuth=azimuth, elevation=0.6, objects=(replace(SPHERE.objects[0], x=0.0, y=30.0),)), 64).image[0]
        darkening = (empty - lit).mean(0)[36:44]
        right, left = darkening[:, 46:60].mean(), darkening[:, 4:18].mean()
        assert side * (right - left) > 0.05


def test_pictures_use_their_range():
    """Night is darker than day but readable; nothing is burnt out, nothing is NaN."""
    scenes = [scene_from_seed(seed, counts=(2,)) for seed in range(9)]
    means = {}
    for light in LIGHTS:
        image = render([replace(scene, light=light) for scene in scenes], 64).image
        assert torch.isfinite(image).all() and image.min() >= 0 and image.max() <= 1
        assert (image.amin(1) > 0.985).float().mean() < 0.002
        means[light] = image.mean().item()
    assert 0.2 < means["night"] < means["day"] - 0.15


def test_tables_and_materials_look_different():
    base = replace(SPHERE, light="day")
    pictures = [render(replace(base, table=table), 64).image[0] for table in TABLES]
    assert all((pictures[i] - pictures[j]).abs().mean() > 0.03 for i in range(3) for j in range(i))
    metal = replace(base, table="checkered", objects=(replace(base.objects[0], material="metal"),))
    rubber = replace(base, table="checkered")
    mask = render(base, 64).masks[0, 0] == 1
    busy = [render(scene, 64).image[0].diff(dim=2)[:, mask[:, 1:]].abs().mean() for scene in (metal, rubber)]
    assert busy[0] > 1.5 * busy[1], "metal mirrors the squares around it"


@pytest.mark.parametrize("light", LIGHTS)
def test_metal_gleams_on_every_face_of_a_drawn_cube(light):
    """A flat face mirrors one spot: drawn as it is, a metal cube cannot be told from a rubber one."""
    for angle in (0.1, 0.7, 1.2):
        for size, colour in (("large", "red"), ("small", "blue"), ("large", "white")):
            obj = Object("cube", colour, size, "metal", 0.3, 0.2, angle)
            metal, rubber = (render(Scene((replace(obj, material=material),), style="sketch", light=light), 128) for material in ("metal", "rubber"))
            inside, normals = metal.masks[0, 0] == 1, metal.normals[0].mul(20).round()  # (3, H, W)
            faces = [inside & (normals == normal[:, None, None]).all(0) for normal in normals[:, inside].unique(dim=1).T]
            faces = [face for face in faces if face.sum() > 100]  # not one that is seen from the edge
            assert len(faces) >= 2
            for face in faces:
                white = [(seen.image[0].amin(0)[face] > 0.8).float().mean().item() for seen in (metal, rubber)]
                assert (metal.image[0] - rubber.image[0])[:, face].abs().mean() > 0.05
                assert colour == "white" or white[0] > 0.05 and white[1] == 0, (angle, size, colour, white)


def test_bad_input_is_explained():
    with pytest.raises(LabkitError, match="at least one scene"):
        render([])
    with pytest.raises(LabkitError, match="size >= 8"):
        render(SPHERE, size=4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_same_picture_on_the_gpu():
    scenes = [scene_from_seed(seed, styles=STYLES) for seed in range(6)]
    here, there = render(scenes, 64), render(scenes, 64, device="cuda")
    apart = (here.image - there.image.cpu()).abs()
    # Single pixels may fall on the other side of an edge; the rest differs by rounding alone.
    assert (apart > 2 / 255).float().mean() < 1e-3 and apart.mean() < 1e-3
