"""Faithfulness: ranks, intervals and IoU are what they are called, and a head that does the work is found to."""

import json

import pytest
import torch
from torch.nn import functional as F

import labkit
from labkit.__main__ import main
from labkit.errors import LabkitError
from labkit.measure import faithfulness
from labkit.measure.faithfulness import Plan, aspect, correlated, error, iou, mean_iou, measure, prepared, ranks, run, spearman, table
from labkit.probes.intervene import Where, ablate
from labkit.schedule import q_sample


@pytest.fixture(scope="module")
def lab():
    return labkit.load("tabletop", device="cpu")


@pytest.fixture(scope="module")
def measured(lab):
    return measure(lab, Plan(scenes=3, t=(500,), batch=2), progress=False)


def test_ranks_share_ties():
    assert ranks(torch.tensor([3.0, 1.0, 3.0, 7.0, 3.0])).tolist() == [3, 1, 3, 5, 3]


@pytest.mark.parametrize("a, b, rho", [
    ([1, 2, 3, 4], [1, 8, 27, 1000], 1.0),  # of ranks: Pearson's would be 0.79
    ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
    ([1, 2, 3, 4, 5], [2, 1, 4, 3, 5], 0.8),  # 1 - 6 sum d^2 / (n (n^2 - 1)) = 1 - 24 / 120
    ([1, 1, 2, 2], [1, 2, 1, 2], 0.0),
    ([1, 1, 1], [1, 2, 3], 0.0),
])  # fmt: skip
def test_spearman(a, b, rho):
    assert spearman(torch.tensor(a, dtype=torch.float), torch.tensor(b, dtype=torch.float)) == pytest.approx(rho)


def test_the_interval_covers_the_truth_and_narrows_with_scenes():
    generator = torch.Generator().manual_seed(0)
    signal = torch.linspace(0, 1, 28)
    cost = lambda n, noise: signal + noise * torch.randn(n, 28, generator=generator)  # noqa: E731
    few, many = (correlated(signal.expand(n, -1), cost(n, 3.0)) for n in (10, 1000))
    assert few[1] <= few[0] <= few[2] and many[2] - many[1] < 0.5 * (few[2] - few[1])
    assert correlated(signal.expand(50, -1), cost(50, 0.0)) == pytest.approx((1, 1, 1))
    nothing = correlated(torch.randn(300, 28, generator=generator), torch.randn(300, 28, generator=generator))
    assert nothing[1] < 0 < nothing[2]


def test_iou_is_that_of_the_upper_half_of_the_range():
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[:2] = True
    m = torch.full((4, 4), 0.1)
    m[:2, :2], m[3, 3] = 0.3, 0.25  # five places above (0.1 + 0.3) / 2, four of them among the mask's eight
    assert iou(m, mask) == pytest.approx(4 / 9)
    assert iou(m * 0.001 + 5, mask) == pytest.approx(4 / 9), "depends on offset or scale"
    assert iou(torch.ones(4, 4), mask) == 0


def test_a_words_tokens_are_added_before_they_are_compared():
    mask = torch.zeros(2, 2, dtype=torch.bool)
    mask[0] = True
    share = torch.zeros(2, 2, 3)
    share[0, 0, 1], share[0, 1, 2] = 0.5, 0.5
    assert mean_iou(share, [([1, 2], mask)]) == 1 and mean_iou(share, [([1], mask), ([1, 2], mask)]) == pytest.approx(0.75)


@pytest.mark.parametrize("n, h, w, shape", [(256, 16, 16, (16, 16)), (64, 16, 16, (8, 8)), (96, 16, 24, (8, 12)), (16, 16, 16, (4, 4))])
def test_places_keep_the_pictures_shape(n, h, w, shape):
    assert aspect(n, h, w) == shape


def test_nouns_have_their_own_objects_masks(lab):
    batch = prepared(lab, faithfulness.FIRST_SEED, 6)
    counts = [len(nouns) for nouns in batch.nouns]
    assert 2 in counts and set(counts) <= {1, 2}, "a noun for each object"
    for nouns, masks in zip(batch.nouns, batch.masks):
        union = torch.stack([mask for _, mask in nouns]).any(0).float()
        assert all(mask.any() for _, mask in nouns) and len({tuple(tokens) for tokens, _ in nouns}) == len(nouns)
        small = F.adaptive_avg_pool2d(union[None], masks.shape[-2:])[0]
        assert (small - masks).abs().mean() < 0.02, "the masks of error and of IoU are of different objects"


def test_cost_is_the_error_that_an_ablation_adds(lab, measured):
    """Computed once more by hand for one head and scene."""
    layer, head = "up_blocks.1.attentions.0.transformer_blocks.0.attn2", 0
    batch, i = prepared(lab, faithfulness.FIRST_SEED, 2), measured.heads.index("up.1.0.0 head 0")
    x_t = q_sample(batch.x0, 500, batch.eps, lab.schedule)
    with torch.no_grad():
        whole = error(lab.unet(x_t, 500, batch.c), batch)
        with ablate(lab, Where("heads", layers=layer, heads=head)):
            without = error(lab.unet(x_t, 500, batch.c), batch)
    assert torch.allclose(measured.cost[:2, i], without / whole - 1, atol=1e-4)
    assert measured.cost.shape == measured.iou.shape == (3, 28) and ((0 <= measured.iou) & (measured.iou <= 1)).all() and (measured.size > 0).all()
    assert measured.cost.std(1).min() > 0, "all heads cost the same"


def test_error_counts_the_objects_places_alone(lab):
    batch = prepared(lab, faithfulness.FIRST_SEED, 2)
    outside = (batch.masks == 0).float()[:, None]
    assert torch.allclose(error(batch.eps + 9 * outside, batch), torch.zeros(2)) and torch.allclose(error(batch.eps + 3, batch), torch.full((2,), 9.0), atol=1e-4)


def test_a_run_leaves_table_and_figure(lab, measured, tmp_path, monkeypatch):
    monkeypatch.setattr(faithfulness, "measure", lambda lab, plan, progress: measured)
    result = run(lab, tmp_path / "f", Plan(scenes=3), progress=False)
    kept = json.loads((tmp_path / "f" / "faithfulness.json").read_text())
    assert kept["heads"] == result["heads"] and len(kept["heads"]) == 28 and (tmp_path / "f" / "faithfulness.png").stat().st_size > 10_000
    lines = table(result).splitlines()
    assert "28 heads" in lines[0] and "3 scenes" in lines[0] and (tmp_path / "f" / "faithfulness.txt").read_text() == table(result) + "\n"
    costs = [float(line.split()[-1].rstrip("%")) for line in lines[4:]]
    assert costs == sorted(costs, reverse=True)


def test_the_command_measures_what_it_is_asked_for(measured, tmp_path, monkeypatch, capsys):
    plans = []
    monkeypatch.setattr(faithfulness, "measure", lambda lab, plan, progress: plans.append(plan) or measured)
    assert main(["measure", "faithfulness", "--scenes", "3", "--by", "mean", "--out", str(tmp_path)]) == 0
    assert plans == [Plan(scenes=3, by="mean")] and "rank correlation" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["faithfulness.json", "faithfulness.png", "faithfulness.txt"]


@pytest.mark.parametrize("plan", [{"scenes": 1}, {"t": ()}, {"batch": 0}])
def test_a_plan_that_cannot_be_is_refused(plan):
    with pytest.raises(LabkitError, match="two scenes or more"):
        Plan(**plan)
