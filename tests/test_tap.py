"""tap: one mechanism to read and to replace, and networks that are as before afterwards."""

import pytest
import torch
from torch import nn

from labkit.errors import LabkitError
from labkit.tap import Tap, listen, taps


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.out = Tap()
        self.made = 0

    def forward(self, x):
        if self.out.active:
            self.made += 1  # what is costly is only made where somebody listens
        return self.out(self.linear(x))


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block())


X = torch.linspace(-1, 1, 6).view(2, 3)


def test_a_tap_is_the_identity_and_no_weight(network):
    assert Tap()(X) is X
    assert set(network.state_dict()) == {f"{i}.linear.{p}" for i in (0, 1) for p in ("weight", "bias")}
    assert [name for name in taps(network)] == ["0.out", "1.out"]
    assert [name for name in taps(network, "1.*")] == ["1.out"]


def test_reading(network):
    plain, seen = network(X), {}
    with listen(network, {"*.out": lambda x, name: seen.update({name: x})}) as names:
        listened = network(X)
    assert names == ["0.out", "1.out"] == list(seen)
    assert torch.equal(seen["0.out"], network[0].linear(X)) and torch.equal(seen["1.out"], plain)
    assert torch.equal(listened, plain)
    assert [block.made for block in network] == [1, 1]


def test_replacing(network):
    plain = network(X)
    with listen(network, {"0.out": lambda x, name: 2 * x}):
        assert torch.allclose(network(X), network[1].linear(2 * network[0].linear(X)))
    assert torch.equal(network(X), plain)


def test_listeners_run_in_the_order_they_came(network):
    with listen(network, {"1.out": lambda x, name: x + 1}):
        with listen(network, {"1.out": lambda x, name: x * 10}):
            both = network(X)
        one = network(X)
    plain = network(X)
    assert torch.allclose(both, (plain + 1) * 10) and torch.allclose(one, plain + 1)


@pytest.mark.parametrize("how", [RuntimeError, KeyboardInterrupt, GeneratorExit])
def test_nothing_stays_attached_whatever_happens(network, how):
    plain = network(X)

    def fail(x, name):
        raise how

    with pytest.raises(how):
        with listen(network, {"1.out": fail}):
            network(X)
    assert not any(tap.active for tap in taps(network).values())
    assert torch.equal(network(X), plain)


def test_the_same_function_twice_is_taken_off_once_each(network):
    def double(x, name):
        return 2 * x

    with listen(network, {"1.out": double}):
        with listen(network, {"1.out": double}):
            pass
        assert torch.equal(network(X), 2 * network[1].linear(network[0].linear(X)))


def test_listening_nowhere_is_an_error_that_attaches_nothing(network):
    with pytest.raises(LabkitError, match=r"no tap matches '\*.attn2.probs' in Sequential; its taps end in: out"):
        with listen(network, {"*.out": print, "*.attn2.probs": print}):
            raise AssertionError("never reached")
    assert not any(tap.active for tap in taps(network).values())
    with pytest.raises(LabkitError, match=r"\(none\)"):
        with listen(nn.Linear(2, 2), {"*": print}):
            pass


def test_a_replacement_must_have_the_shape(network):
    with pytest.raises(LabkitError, match=r"1.out returned shape \(1, 3\), the tap carries \(2, 3\)"):
        with listen(network, {"1.out": lambda x, name: x[:1]}):
            network(X)
    with pytest.raises(LabkitError, match="1.out returned a tuple; a tensor replaces, None only reads"):
        with listen(network, {"1.out": lambda x, name: (x, x)}):
            network(X)
