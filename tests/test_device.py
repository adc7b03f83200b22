"""device: the right device and dtype, and noise that depends on the seed alone."""

import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor

from labkit.device import Noise, has_bfloat16, pick_device, pick_dtype, vae_dtype
from labkit.errors import LabkitError


def test_best_device_is_one_that_works():
    torch.zeros(1, device=pick_device())


def test_named_device():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta", 3.5, ""])
def test_unknown_or_absent_device_is_one_line(name):
    with pytest.raises(LabkitError) as error:
        pick_device(name)
    assert "\n" not in str(error.value) and repr(name) in str(error.value)


def test_dtype_defaults_and_names():
    assert pick_dtype("cpu") is torch.float32
    assert pick_dtype("mps") is torch.float32
    assert pick_dtype("cpu", "bfloat16") is pick_dtype("cpu", torch.bfloat16) is torch.bfloat16


@pytest.mark.parametrize("capability, dtype", [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)])
def test_dtype_of_a_gpu_is_the_half_one_it_is_made_for(capability, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert pick_dtype("cuda") is pick_dtype(torch.device("cuda:0")) is dtype
    assert pick_dtype("cuda", "float32") is torch.float32


@pytest.mark.parametrize(
    "dtype, force_upcast, expected",
    [
        (torch.float16, True, torch.float32),
        (torch.float16, False, torch.float16),
        (torch.float16, None, torch.float16),
        (torch.bfloat16, True, torch.bfloat16),
        (torch.float32, True, torch.float32),
        (None, True, None),
    ],
)
def test_dtype_of_the_vae(dtype, force_upcast, expected):
    assert vae_dtype(dtype, force_upcast) is expected


@pytest.mark.parametrize("device, dtype", [("cpu", "int8"), ("cpu", "float"), ("cpu", torch.int64), ("mps", "float64")])
def test_dtype_that_cannot_work(device, dtype):
    with pytest.raises(LabkitError):
        pick_dtype(device, dtype)


def test_of_processors_those_with_units_for_it_train_in_bfloat16(monkeypatch):
    for amx, avx in ((True, False), (False, True), (False, False)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx, raising=False)
        assert has_bfloat16("cpu") is (amx or avx)
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):  # an older torch cannot tell
        monkeypatch.delattr(torch.cpu, name, raising=False)
    assert not has_bfloat16("cpu")
    for capability, has in (((7, 5), False), ((8, 0), True)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda which: capability)
        assert has_bfloat16("cuda") is has


def test_noise_equals_diffusers_with_a_list_of_generators():
    seeds = [3, 1, 4, 1, 5]
    noise = Noise(seeds, (4, 8, 6))
    generators = [torch.Generator("cpu").manual_seed(s) for s in seeds]
    for _ in range(3):  # successive draws continue the streams
        assert torch.equal(noise.draw(), randn_tensor((5, 4, 8, 6), generator=generators))


def test_noise_equals_diffusers_with_one_generator():
    assert torch.equal(
        Noise([7], (4, 8, 8)).draw(), randn_tensor((1, 4, 8, 8), generator=torch.Generator("cpu").manual_seed(7))
    )


def test_an_image_is_independent_of_its_neighbours():
    alone, among = Noise([42], (4, 5, 7)), Noise([0, 42, 9], (4, 5, 7))  # 140 values: not a multiple of a SIMD width
    for _ in range(2):
        assert torch.equal(alone.draw()[0], among.draw()[1])


def test_noise_leaves_the_global_stream_alone_and_ignores_it():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = Noise([1], (4, 8, 8)).draw()
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(1)
    assert torch.equal(first, Noise([1], (4, 8, 8)).draw())


def is_standard_normal(z: torch.Tensor) -> bool:
    z = z.double().flatten()
    return bool(abs(z.mean()) < 0.02 and abs(z.var() - 1) < 0.02 and abs((z**4).mean() - 3) < 0.1 and z.min() < -3)


def test_noise_is_normal_and_not_uniform():
    z = Noise(range(10), (4, 64, 64)).draw()
    assert z.dtype is torch.float32 and z.device.type == "cpu"
    assert is_standard_normal(z)
    twin = torch.rand(z.shape, generator=torch.Generator().manual_seed(0))  # rand for randn
    assert not is_standard_normal(twin)
    assert not is_standard_normal((twin - 0.5) * 12**0.5)  # even with the right mean and variance


@pytest.mark.parametrize(
    "seeds, shape",
    [([], (4, 8, 8)), (3, (4, 8, 8)), ([1.5], (4, 8, 8)), (["a"], (4, 8, 8)), ([-1], (4, 8, 8)), ([2**64], (4, 8, 8)),
     ([None], (4, 8, 8)), ([0], (8, 8)), ([0], (4, 0, 8)), ([0], (4, 8.0, 8))],
)
def test_bad_seeds_and_shapes_are_one_line(seeds, shape):
    with pytest.raises(LabkitError) as error:
        Noise(seeds, shape)
    assert "\n" not in str(error.value)


def test_numpy_seeds_are_seeds():
    import numpy as np

    assert torch.equal(Noise(np.arange(2), (1, 2, 2)).draw(), Noise([0, 1], (1, 2, 2)).draw())
