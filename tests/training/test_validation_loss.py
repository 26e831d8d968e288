"""Each objective's loss at given times: by formula, in training's own units, and over buckets of two sizes."""

from types import SimpleNamespace

import pytest
import torch

from kolors_fast.evaluation.validation_loss import normal
from kolors_fast.training.config import EpsilonLinearStage, EpsilonStage, LearnedVarianceStage, RectifiedFlowStage
from kolors_fast.training.learned_variance import DiffusionProcess, LearnedVarianceObjective
from kolors_fast.training.mmdit import EpsilonLinearObjective, RectifiedFlowObjective, SD3Captions
from kolors_fast.training.objectives import EpsilonObjective, alpha_bar, snr_weights, validation_loss
from kolors_fast.training.pool import Bucket
from kolors_fast.training.streams import Streams

COMMON = {"steps": 9, "learning_rate": 1e-3, "warmup": 0, "decay": 0, "batch": 4, "captions": 2}
C = 0.3  # models answer C z


class Linear(torch.nn.Module):
    """C z, with a v of zeros behind it where `channels` are twice as many; keeps the timesteps that it was told."""

    def __init__(self, doubled=False):
        super().__init__()
        self.doubled, self.told = doubled, []

    def forward(self, sample, *arguments, **_):
        self.told.append(next(a for a in arguments if a.dim() == 1).tolist())
        return (torch.cat([C * sample, torch.zeros_like(sample)], 1) if self.doubled else C * sample,)


class Untexted:
    """Captions of nothing."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def gather(self, which):
        return ()


class Plain(LearnedVarianceObjective):
    def predict(self, module, noisy, timesteps, texts):
        return module(noisy, timesteps)[0]


def sd3_captions(count):
    value = torch.arange(count)
    shapes = ((3, 2), (2,), (3, 4), (4,), (5, 6))
    return SD3Captions(*(value.view(-1, *[1] * len(s)).expand(-1, *s).half() for s in shapes))


def made(name, items=6):
    """An objective, its pool of two buckets, and the model that it trains."""
    generator, buckets = torch.Generator().manual_seed(0), []
    kinds = {"epsilon": Untexted, "learned": Untexted, "flow": sd3_captions, "linear": sd3_captions}
    for count, size in ((items, (64, 64)), (items - 2, (64, 32))):
        latents = torch.randn(count, 4, size[0] // 8, size[1] // 8, generator=generator).half()
        buckets.append(Bucket(size, latents, kinds[name](2 * count + 1)))
    pool, streams, module = SimpleNamespace(buckets=buckets), Streams(0, "stage"), Linear(name == "learned")
    stages = {"epsilon": EpsilonStage, "learned": LearnedVarianceStage, "flow": RectifiedFlowStage}
    stage = stages.get(name, EpsilonLinearStage)(name="stage", objective=name, **COMMON)
    if name == "epsilon":
        one = EpsilonObjective(module, None, None, None, pool, stage, streams)
        one.predict = lambda module, noisy, timesteps, texts, time_ids: module(noisy, timesteps)[0]
    elif name == "learned":
        one = Plain(module, None, None, pool, stage, streams)
    else:
        kind = RectifiedFlowObjective if name == "flow" else EpsilonLinearObjective
        one = kind(module, None, None, pool, stage, streams)
    return one, pool, module


def by_formula(name, x, n, time):
    """The loss of C z of one sample, in float64."""
    x, n = x.double(), n.double()
    if name == "flow":
        return (C * ((1 - time) * x + time * n) - (n - x)).square().mean()
    steps, end = (1100, 0.014) if name == "epsilon" else (1000, 0.012)
    t = int(time * steps)
    signal = (DiffusionProcess().signal if name == "learned" else alpha_bar(steps, end))[t].double()
    error = (C * (signal.sqrt() * x + (1 - signal).sqrt() * n) - n).square().mean()
    if name == "epsilon":
        return error * snr_weights(signal, 5.0)
    if name == "learned":
        z = C * (signal.sqrt() * x + (1 - signal).sqrt() * n)
        output = torch.cat([z, torch.zeros_like(z)])[None]
        bound = DiffusionProcess().variational_bound(output, x[None], n[None], torch.tensor([t]))
        return error + bound[0]
    return error


@pytest.mark.parametrize("name", ["epsilon", "learned", "flow", "linear"])
def test_loss_at_is_the_formula_at_that_time(name):
    one, pool, module = made(name)
    bucket, items, times = pool.buckets[1], torch.tensor([3, 0]), torch.tensor([0.0625, 0.9375])
    noise = normal((2, *bucket.latents.shape[1:]), [torch.Generator().manual_seed(k) for k in (1, 2)])
    losses = one.loss_at(module, bucket, items, times, noise)
    wanted = [by_formula(name, bucket.latents[i], n, t) for i, n, t in zip(items, noise, times.tolist(), strict=True)]
    torch.testing.assert_close(losses.double(), torch.stack(wanted), rtol=2e-4, atol=1e-6)
    ends = {"epsilon": [68, 1031], "flow": [62.5, 937.5]}.get(name, [62, 937])
    assert module.told[-1] == pytest.approx(ends)


@pytest.mark.parametrize("name", ["epsilon", "learned", "flow", "linear"])
def test_validation_is_the_mean_over_all_buckets(name):
    one, pool, module = made(name)
    found = validation_loss(one, module, pool, batch=4, count=3, seed=7)
    assert found.items == 10
    assert sum(map(len, module.told)) == 30
    assert validation_loss(one, module, pool, batch=3, count=3, seed=7).losses == pytest.approx(found.losses, rel=1e-5)
    only = SimpleNamespace(buckets=pool.buckets[:1])  # whose items keep their numbers, and so their noise
    first = validation_loss(one, module, only, batch=4, count=3, seed=7)
    rest = [10 * whole - 6 * part for whole, part in zip(found.losses, first.losses, strict=True)]
    assert min(rest) > 0 and first.items == 6


def test_every_item_of_every_bucket_is_seen_once_a_time():
    _, pool, module = made("flow")
    seen = []

    def loss_at(given, bucket, items, times, noise):
        assert given is module and noise.shape == (len(items), *bucket.latents.shape[1:])
        seen.extend((bucket.size, item, time) for item, time in zip(items.tolist(), times.tolist(), strict=True))
        return times

    validation_loss(SimpleNamespace(loss_at=loss_at), module, pool, batch=4, count=2)
    every = {(b.size, item, t) for b in pool.buckets for item in range(len(b.latents)) for t in (0.25, 0.75)}
    assert len(seen) == 20 and set(seen) == every


def test_captions_are_the_first_ones_of_the_items():
    one, pool, _ = made("flow")
    seen = []

    class Seeing(torch.nn.Module):
        def forward(self, sample, states, pooled, told, return_dict):
            seen.append(pooled[:, 0])
            return (sample,)

    times, noise = torch.full((2,), 0.5), torch.zeros(2, 4, 8, 8)
    one.loss_at(Seeing(), pool.buckets[0], torch.tensor([4, 1]), times, noise)
    assert seen[0].tolist() == [8, 2]
