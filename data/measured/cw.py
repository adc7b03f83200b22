# cw.py MODEL SEED N CATEGORY...
import sys, time
import numpy as np
import labkit
from labkit.scenes.judge import right, alone
from labkit.scenes.prompts import load_prompts
from labkit.scenes.verify import read
from labkit.training.draw import Plan, jobs
if __name__ == "__main__":
    model, seed, n = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    lab = labkit.optimize(labkit.load(model)); prompts = load_prompts()
    wanted = jobs(prompts, Plan(prompts=n, seeds=1, seed=seed))
    for cat in sys.argv[4:]:
        row = wanted[cat]; r = a = 0; t = time.time(); pics = []
        for i in range(0, len(row), 20):
            part = row[i:i+20]
            images = lab.generate([j.text for j in part], negative_prompt=[j.negative for j in part], seed=[j.seed for j in part], progress=False, guidance=4.0, steps=30).images
            reads = read(np.stack([np.asarray(im.convert("RGB")) for im in images]))
            for j, s in zip(part, reads):
                r += right(s, prompts[j.prompt].wants); a += alone(s, prompts[j.prompt].wants)
            pics += images
        print(cat, seed, len(row), "right", r, "alone", a, f"{time.time()-t:.0f} s", flush=True)
        from PIL import Image
        sheet = Image.new("RGB", (128*10, 128*6))
        for k, im in enumerate(pics[:60]): sheet.paste(im, (128*(k%10), 128*(k//10)))
        sheet.save(f"/tmp/cw-{cat.replace(' ', '-')}-{seed}.png")
