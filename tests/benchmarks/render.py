"""Scenes rendered per second: one process, one thread, then render_many with one and two workers.

    python tests/benchmarks/render.py [number of scenes]
"""

import sys
import time

import torch

from labkit.scenes.render import render, render_many
from labkit.scenes.scene import scene_from_seed


def main(count: int) -> None:
    torch.set_num_threads(1)
    photos = [scene_from_seed(seed) for seed in range(count)]
    sketches = [scene_from_seed(seed, styles=("sketch",)) for seed in range(count // 4)]
    for name, scenes in (("photo", photos), ("sketch", sketches)):
        render(scenes[:4])
        wall, cpu = time.perf_counter(), time.process_time()
        render(scenes)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(f"render, 1 thread, {name:6s}  {len(scenes) / wall:6.1f} scenes/s   ({len(scenes) / cpu:.1f} per CPU second)")
    for workers in (1, 2):
        start = time.perf_counter()
        render_many(photos, workers=workers)
        print(f"render_many, workers={workers}     {count / (time.perf_counter() - start):6.1f} scenes/s   (start-up included)")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 400)
