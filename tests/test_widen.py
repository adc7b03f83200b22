"""A widened network: says what the narrow one says, and its new channels learn."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import tiny
from labkit.errors import LabkitError
from labkit.models.unet import UNet
from labkit.training.widen import spread, widen

THREE = replace(tiny.UNET, block_out_channels=(16, 32, 48), cross_attention=(True, True, False), num_attention_heads=(2, 4, 4), layers_per_block=2)


def narrow(config=THREE) -> UNet:
    return tiny.strong(UNet(config))[0].eval()


def seen():
    g = torch.Generator().manual_seed(1)
    return torch.randn(3, 4, 8, 8, generator=g), torch.tensor([20, 400, 950]), torch.randn(3, 7, 48, generator=g)


def apart(a, b) -> float:
    return float((a - b).detach().square().mean().sqrt() / a.detach().square().mean().sqrt())


@pytest.mark.parametrize("factor", [1, 2, 3])
@pytest.mark.parametrize("config", [tiny.UNET, THREE, replace(THREE, use_linear_projection=True)])
def test_without_noise_it_predicts_the_same(config, factor):
    unet = narrow(config)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    wide = widen(unet, replace(config, block_out_channels=tuple(factor * n for n in config.block_out_channels)), noise=0.0)
    with torch.no_grad():
        assert apart(unet(*seen()), wide(*seen())) < 2e-6
    assert all(torch.equal(before[name], value) for name, value in unet.state_dict().items()), "the narrow one is not changed"


@pytest.mark.parametrize("widths", [(32, 64, 96), (32, 64, 72), (16, 48, 64), (16, 40, 48)])
def test_with_noise_or_uneven_widths_nearly_the_same(widths):
    unet, other = narrow(), tiny.strong(UNet(THREE), seed=5)[0]
    wide = widen(unet, replace(THREE, block_out_channels=widths))
    with torch.no_grad():
        said = unet(*seen())
        assert apart(said, wide(*seen())) < 0.5 * apart(said, other(*seen()))


def test_new_channels_are_no_copies_and_learn():
    """Copies that share what follows have gradients alike, and Adam's steps would keep them alike for ever."""
    config = replace(THREE, block_out_channels=(32, 64, 96))
    wide = widen(narrow(), config)
    optimizer = torch.optim.Adam(wide.parameters(), lr=1e-3)
    target = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    for _ in range(3):
        optimizer.zero_grad()
        F.mse_loss(wide(*seen()), target).backward()
        optimizer.step()
    conv, readers = wide.down_blocks[0].resnets[0].conv1.weight, wide.down_blocks[0].resnets[0].conv2.weight
    _, source, fresh = spread([16], [32])
    for new, old in zip(fresh.nonzero()[:, 0], source[fresh]):
        own = (~fresh).nonzero()[old, 0]
        assert apart(conv[own], conv[new]) > 0.2 and readers[:, new].abs().max() > 1e-4, "read by now, and another pattern than its source"


def test_one_seed_one_network():
    config = replace(THREE, block_out_channels=(32, 64, 96))
    one, again, another = (widen(narrow(), config, seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(map(torch.equal, one.values(), again.values())) and not all(map(torch.equal, one.values(), another.values()))


def test_where_channels_go():
    place, source, fresh = spread([4, 2], [6, 4])
    assert place.tolist() == [0, 1, 3, 4, 6, 8] and source.tolist() == [0, 1, 0, 2, 3, 2, 4, 4, 5, 5]
    assert fresh.tolist() == [False, False, True] * 2 + [False, True] * 2
    place, source, fresh = spread([5], [5])
    assert place.tolist() == source.tolist() == [0, 1, 2, 3, 4] and not fresh.any()


@pytest.mark.parametrize("other, says", [
    (replace(THREE, block_out_channels=(16, 24, 48)), "cannot grow"),
    (replace(THREE, block_out_channels=(24, 32, 48)), "a multiple of what it was"),
    (replace(THREE, block_out_channels=(16, 36, 48)), "multiples of 8"),
    (replace(THREE, block_out_channels=(32, 32, 48)), "differ where they did"),
    (replace(THREE, block_out_channels=(32, 64)), "only these can grow"),
    (replace(THREE, layers_per_block=3), "only these can grow"),
])
def test_what_cannot_grow_is_refused(other, says):
    with pytest.raises(LabkitError, match=says):
        widen(narrow(), other)


def test_neighbours_alike_grow_alike():
    even = replace(THREE, block_out_channels=(16, 16, 48))
    with pytest.raises(LabkitError, match="differ where they did"):
        widen(narrow(even), replace(even, block_out_channels=(16, 32, 48)))
    with torch.no_grad():
        assert apart(narrow(even)(*seen()), widen(narrow(even), replace(even, block_out_channels=(32, 32, 96)), noise=0.0)(*seen())) < 2e-6
