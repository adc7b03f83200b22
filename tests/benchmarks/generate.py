"""Where the time of `python -m labkit generate` goes, wall and processor seconds for each part.

    python tests/benchmarks/generate.py [MODEL]
"""

import sys
import time


def main(model: str = "tabletop", prompt: str = "a red sphere left of a blue cube") -> None:
    wall, cpu = time.perf_counter(), time.process_time()
    first = wall, cpu

    def lap(what: str) -> None:
        nonlocal wall, cpu
        now = time.perf_counter(), time.process_time()
        print(f"{what:44} {now[0] - wall:7.2f} s wall {now[1] - cpu:7.2f} s processor")
        wall, cpu = now

    import torch

    lap("import torch")
    import labkit
    from labkit import plots

    lab = labkit.load(model, "cpu")
    lap("load the model")
    for again in ("first time", "second time"):
        lab.generate(prompt, progress=False)
        lap(f"one picture, {again}")
    with labkit.record(lab, latents=True) as trace:
        drawn = lab.generate(prompt, progress=False)
    lap("one picture, recorded")
    way = labkit.decode_trajectory(lab, trace.steps)
    lap("trajectory decoded")
    sweep = labkit.sweep_guidance(lab, prompt)
    lap("guidance sweep, 12 pictures")
    plots.png(plots.word_heatmaps(drawn.image, trace.heatmaps()))
    lap("figure of words, with import of matplotlib")
    plots.png(plots.trajectory(way.x_t, way.x0, way.t))
    plots.png(plots.guidance_sweep(sweep.images, sweep.scales, sweep.seeds))
    lap("the other two figures")
    wall, cpu = first
    lap(f"all of it, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main(*sys.argv[1:])
