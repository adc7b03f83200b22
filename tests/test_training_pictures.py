"""Training on one's own pictures: whatever lies in a folder is read rightly or reported by name; a model learns it, is saved, and draws."""

import json
import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch import nn

import labkit
from labkit.__main__ import main
from labkit.checkpoint import save_pipeline
from labkit.diffusion import LatentDiffusion
from labkit.errors import LabkitError
from labkit.schedule import Schedule, ScheduleConfig, v_from
from labkit.training import diffusion, finetune, imagefolder
from labkit.training.finetune import CONFIG, read_pictures
from labkit.training.imagefolder import read_folder, square
from labkit.training.loop import Share

SHORT = replace(CONFIG, steps=6, batch_size=4, lr=1e-3, save_every=2, warmup=1)
RED, BLUE = (220, 20, 30), (20, 40, 210)


def write(folder, rows, name="metadata.jsonl"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def coloured(folder, n=6, side=20):
    """A folder of discs, half of them red and half blue, with captions that say so; one in three lies in a subfolder."""
    rows, (y, x) = [], np.mgrid[:side, :side]
    for i in range(n):
        image = np.full((side, side, 3), 240, np.uint8)
        image[(y - 9 - i % 3) ** 2 + (x - 10) ** 2 < 30] = (RED, BLUE)[i % 2]
        name = f"more/{i}.png" if i % 3 == 0 else f"{i}.png"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / name)
        rows.append({"file_name": name, "text": f"a {('red', 'blue')[i % 2]} ball"})
    write(folder, rows)
    return folder


@pytest.fixture(scope="module")
def lab():
    return tiny.build()


# -- reading ---------------------------------------------------------------------------------------------------------


def test_pictures_and_captions_come_in_order_and_from_subfolders(tmp_path):
    pictures = read_folder(coloured(tmp_path), 16)
    assert len(pictures) == 6 and pictures.texts[:3] == ("a red ball", "a blue ball", "a red ball") and pictures.skipped == ()
    assert pictures[0:6].shape == (6, 16, 16, 3) and pictures[2:4].dtype == np.uint8
    assert np.array_equal(pictures[4:5][0], square(tmp_path / "4.png", 16))
    middle = pictures[0:2][:, 8, 8].astype(int)
    assert abs(middle - [RED, BLUE]).max() <= 2
    write(tmp_path / "more", [{"file_name": "0.png", "text": "again"}])  # metadata of a subfolder's own
    assert read_folder(tmp_path, 16).texts.count("again") == 1
    other = read_folder(tmp_path, 16)
    (tmp_path / "more" / "metadata.jsonl").unlink()
    assert pictures.sha256 == read_folder(tmp_path, 16).sha256 != other.sha256


def test_metadata_may_be_a_table_with_commas(tmp_path):
    coloured(tmp_path, 2)
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").write_text('file_name,text\nmore/0.png,"red, and round"\n1.png,blue\n', encoding="utf-8-sig")
    assert read_folder(tmp_path, 8).texts == ("red, and round", "blue")


def test_the_middle_square_is_cut_and_resized():
    image = np.zeros((30, 60, 3), np.uint8)
    image[:, 15:45] = (np.arange(30)[None, :, None] * 8).astype(np.uint8)  # the middle square: a ramp from left to right
    image[:, 45:] = 255
    from io import BytesIO

    Image.fromarray(image).save(file := BytesIO(), "PNG")
    found = square(file, 15)
    assert found.shape == (15, 15, 3) and found.max() < 245, "the white beyond the square does not come in"
    assert abs(found[7, :, 0].astype(int) - (np.arange(15) * 16 + 4)).max() <= 3


def one(tmp_path, image, name="one.png", **how):
    image.save(tmp_path / name, **how)
    return square(tmp_path / name, 8)


def test_every_kind_of_picture_becomes_rgb(tmp_path):
    flat = lambda mode, value: Image.new(mode, (8, 8), value)  # noqa: E731
    is_all = lambda found, colour, within=0: abs(found.astype(int) - colour).max() <= within  # noqa: E731
    assert is_all(one(tmp_path, flat("L", 77)), (77, 77, 77))
    assert is_all(one(tmp_path, flat("1", 1)), (255, 255, 255))
    assert is_all(one(tmp_path, flat("LA", (0, 0))), (255, 255, 255)), "transparent is white, not what colour is hidden there"
    assert is_all(one(tmp_path, flat("RGBA", (200, 0, 0, 51))), (244, 204, 204), 1)
    palette = flat("RGB", RED).convert("P", palette=Image.Palette.ADAPTIVE)
    assert is_all(one(tmp_path, palette), RED)
    assert is_all(one(tmp_path, palette, transparency=palette.getpixel((0, 0))), (255, 255, 255))
    assert is_all(one(tmp_path, flat("CMYK", (0, 255, 255, 0)), "one.tif"), (255, 0, 0))
    grey16 = Image.fromarray(np.full((8, 8), 128 * 257, np.uint16))
    assert grey16.mode.startswith("I") and is_all(one(tmp_path, grey16), (128, 128, 128)), "16 bits are scaled, not cut off"
    with pytest.raises(LabkitError, match="fractions"):
        one(tmp_path, flat("F", 0.5), "one.tif")


def test_the_camera_was_turned(tmp_path):
    image = np.zeros((8, 8, 3), np.uint8)
    image[:4] = RED  # above
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned to the right
    found = one(tmp_path, Image.fromarray(image), exif=exif)
    assert tuple(found[4, 7]) == RED and tuple(found[0, 0]) == (0, 0, 0)


def spoilt(tmp_path):
    """Six good pictures and, by name, what is wrong with the others."""
    coloured(tmp_path)
    whole = (tmp_path / "1.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("no picture")
    for name in ("silent.png", "unnamed.png", "blank.png"):
        (tmp_path / name).write_bytes(whole)
    lines = [{"file_name": "cut.png", "text": "a ball"}, {"file_name": "text.jpg", "text": "a ball"}, {"file_name": "gone.png", "text": "a ball"},
             {"file_name": "silent.png"}, {"file_name": "blank.png", "text": "  "}, {"text": "a ball"}, {"file_name": "a\0b.png", "text": "a ball"}]  # fmt: skip
    with open(tmp_path / "metadata.jsonl", "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in lines) + "{broken\n")
    return {"cut.png": "cannot be read", "text.jpg": "cannot be read", "gone.png": "is not there", "silent.png": "has no caption", "unnamed.png": "has no caption",
            "blank.png": "has no caption"}  # fmt: skip


def test_what_is_bad_is_named_and_refused_or_skipped(tmp_path):
    faults = spoilt(tmp_path)
    with pytest.raises(LabkitError, match=r"9 of 15 pictures cannot be trained on.*and 1 more.*--on-bad skip") as error:
        read_folder(tmp_path, 16)
    assert "\n" not in str(error.value)
    pictures = read_folder(tmp_path, 16, on_bad="skip")
    assert len(pictures) == 6 and len(pictures.skipped) == 9
    for name, reason in faults.items():
        assert any(line.startswith(f"{name}: {reason}") for line in pictures.skipped), (name, pictures.skipped)
    assert sum(line.startswith("metadata.jsonl: entry") for line in pictures.skipped) == 3
    assert pictures.sha256 == read_folder(coloured(tmp_path / "clean"), 16).sha256, "what is skipped changes nothing"


@pytest.mark.parametrize("name", ["../outside.png", "more/../../outside.png", "{folder}/../outside.png", "link.png"])
def test_names_that_leave_the_folder_are_refused_even_when_skipping(tmp_path, name):
    folder = coloured(tmp_path / "pictures", 2)
    Image.new("RGB", (8, 8)).save(tmp_path / "outside.png")
    if name == "link.png":
        try:
            os.symlink(tmp_path / "outside.png", folder / name)
        except OSError:
            pytest.skip("this system makes no links")
    write(folder, [{"file_name": name.format(folder=folder), "text": "a ball"}])
    with pytest.raises(LabkitError, match="entry 1 leads out of the folder"):
        read_folder(folder, 8, on_bad="skip")


def test_nothing_to_train_on(tmp_path):
    with pytest.raises(LabkitError, match="is no folder"):
        read_folder(tmp_path / "nowhere", 8)
    with pytest.raises(LabkitError, match="has no captions; write a metadata.jsonl"):
        read_folder(tmp_path, 8)
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    for on_bad in ("refuse", "skip"):
        with pytest.raises(LabkitError, match=r"1 of 1 pictures cannot be trained on: one.png: has no caption\. Mend them\.$"):
            read_folder(tmp_path, 8, on_bad=on_bad)
    with pytest.raises(LabkitError, match="'ask': use 'refuse' or 'skip'"):
        read_folder(tmp_path, 8, on_bad="ask")
    (tmp_path / "metadata.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(LabkitError, match="metadata.jsonl: cannot be read.*UTF-8"):
        read_folder(tmp_path, 8)


def test_too_many_pixels_are_no_trap(tmp_path, monkeypatch):
    coloured(tmp_path, 2)
    for limit in (300, 100):  # PIL warns of more than the limit and refuses more than twice as much
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(LabkitError, match="2 of 2 pictures.*cannot be read"):
            read_folder(tmp_path, 8)


def test_words_that_the_model_does_not_know_are_named_with_their_picture(lab, tmp_path):
    coloured(tmp_path)
    with open(tmp_path / "metadata.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"file_name": "1.png", "text": "a red dog left of a blue cat"}) + "\n")
        file.write(json.dumps({"file_name": "2.png", "text": "red " * 20}) + "\n")
    pictures = read_pictures(lab, tmp_path, "skip")
    assert len(pictures) == 6 and pictures.side == 16
    assert pictures.skipped[0] == "1.png: tiny does not know 'dog', 'cat'" and "2.png: its caption is too long" in pictures.skipped[1]


# -- training --------------------------------------------------------------------------------------------------------


def error_of(lab, pictures, folder):
    """The noise-prediction error on a fixed batch."""
    latents = diffusion.latents(lab.vae, pictures, folder / "latents.safetensors", "cpu", lab.vae.config.scaling_factor)
    recipe = finetune.recipe(lab, lab.unet, pictures, latents)
    with torch.no_grad():
        return float(recipe.players[0].objective(recipe.batch(0, Share(0, 1, 64, 123, torch.device("cpu"))))["loss"])


def test_a_model_learns_ones_own_pictures_from_the_command_line(lab, tmp_path, capsys):
    model, pictures, run = tmp_path / "tiny", coloured(tmp_path / "pictures"), tmp_path / "run"
    save_pipeline(lab, model)
    (pictures / "broken.png").write_bytes(b"\x89PNG")
    command = ["train", "diffusion", "--pictures", str(pictures), "--model", str(model), "--folder", str(run), "--device", "cpu"]
    assert main(command) == 2 and "broken.png: has no caption" in capsys.readouterr().err
    options = ["--on-bad", "skip", "--steps", "30", "--batch-size", "8", "--lr", "3e-3"]
    assert main(command + options) == 0
    said = capsys.readouterr()
    assert "labkit: skipped broken.png: has no caption" in said.err and "trained on 6 pictures" in said.out
    own = labkit.load(run / "model", "cpu")
    of = read_pictures(lab, pictures, "skip", progress=False)
    assert error_of(own, of, run) < 0.6 * error_of(lab, of, run)
    assert own.name == "run" and own.vocabulary == lab.vocabulary
    assert own.generate("a red ball", steps=2, progress=False).image.size == (16, 16)
    for part in ("vae", "text_encoder"):
        theirs, ours = getattr(own, part).state_dict(), getattr(lab, part).state_dict()
        assert all(torch.equal(theirs[name], ours[name].half().float()) for name in ours), f"the {part} stays what it was"
    assert (run / "sheet-000030.png").exists()
    saved = (run / "checkpoint.pt").read_bytes()
    assert main(command + options) == 0 and (run / "checkpoint.pt").read_bytes() == saved, "a finished run is not trained further"


def test_it_resumes_to_the_same_weights_and_refuses_other_pictures(lab, tmp_path):
    before = {name: value.clone() for name, value in lab.unet.state_dict().items()}
    pictures = read_pictures(lab, coloured(tmp_path / "pictures"))
    whole = finetune.finetune(lab, pictures, tmp_path / "whole", SHORT, progress=False)

    class Stopped(Exception):
        pass

    def stop(step, losses):
        if step == 3:
            raise Stopped

    recipe = finetune.recipe
    with pytest.MonkeyPatch.context() as m:
        m.setattr(finetune, "recipe", lambda *a: replace(recipe(*a), stop_step=stop))
        with pytest.raises(Stopped):
            finetune.finetune(lab, pictures, tmp_path / "run", SHORT, progress=False)
    resumed = finetune.finetune(lab, pictures, tmp_path / "run", SHORT, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(whole.unet.state_dict().values(), resumed.unet.state_dict().values()))
    assert all(torch.equal(before[name], value) for name, value in lab.unet.state_dict().items()), "the model itself is not changed"
    assert not all(torch.equal(before[name], value) for name, value in whole.unet.state_dict().items())
    Image.new("RGB", (20, 20), RED).save(tmp_path / "pictures" / "1.png")
    with pytest.raises(LabkitError, match="run began with other pictures than these"):
        finetune.finetune(lab, read_pictures(lab, tmp_path / "pictures"), tmp_path / "run", SHORT, progress=False)
    with pytest.raises(LabkitError, match="run began with other weights than these"):
        finetune.finetune(resumed, pictures, tmp_path / "run", SHORT, progress=False)


def test_a_model_in_half_precision_is_refused(lab, tmp_path):
    pictures = read_pictures(lab, coloured(tmp_path / "pictures", 2))
    half = LatentDiffusion(lab.unet, lab.vae, lab.text_encoder, lab.tokenizer, lab.schedule_config, "half")
    half.unet = SimpleNamespace(config=lab.unet.config, conv_in=nn.Conv2d(4, 4, 1).half())
    with pytest.raises(LabkitError, match="half is in float16.*dtype='float32'"):
        finetune.finetune(half, pictures, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_networks_that_predict_v_or_x0_are_asked_for_the_noise_that_follows(kind):
    schedule, g = Schedule(ScheduleConfig(prediction_type=kind)), torch.Generator().manual_seed(0)
    x0, eps, t = torch.randn(3, 4, 2, 2, generator=g), torch.randn(3, 4, 2, 2, generator=g), torch.tensor([10, 400, 900])
    right = {"v_prediction": v_from(x0, t, eps, schedule), "sample": x0}[kind]
    objective = diffusion.NoisePrediction(lambda x_t, t, c: right + 0.1, None, schedule, 5.0)
    snr = (schedule.alpha_bar / (1 - schedule.alpha_bar)).float()[t]
    weight = {"v_prediction": snr.clamp(max=5) / (snr + 1), "sample": snr.clamp(max=5)}[kind]  # of the squared error of what the network says (Hang et al. 2023)
    torch.testing.assert_close(objective({"x0": x0, "eps": eps, "t": t, "c": None})["loss"], (weight * 0.01).mean())


def test_captions_are_dropped_for_guidance(lab, tmp_path):
    pictures = read_pictures(lab, coloured(tmp_path / "pictures"))
    latents = diffusion.latents(lab.vae, pictures, tmp_path / "latents.safetensors", "cpu", lab.vae.config.scaling_factor)
    share = Share(0, 1, 400, 0, torch.device("cpu"))
    c = finetune.recipe(lab, lab.unet, pictures, latents).batch(0, share)["c"]
    empty, red, blue = ((c == lab.encode_text(text)).flatten(1).all(1).float().mean() for text in ("", "a red ball", "a blue ball"))
    assert empty + red + blue == 1 and abs(empty - 0.1) < 0.05 and min(red, blue) > 0.35


def test_options_that_do_not_go_together(capsys):
    for argv, says in (
        (["train", "vae", "--pictures", "x"], "train diffusion --pictures"),
        (["train", "diffusion", "--pictures", "x", "--preset", "smoke"], "without a preset"),
        (["train", "all", "--on-bad", "skip"], "--on-bad is for your own pictures"),
    ):
        assert main(argv) == 2 and says in capsys.readouterr().err
    assert imagefolder.plain("a\x1b[2J\nb") == "a\\x1b[2J\\nb"
