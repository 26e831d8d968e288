"""Running moments against numpy in one pass, bins against a loop, and both split among workers."""

import json
import math
import os
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kolors_fast.evaluation.statistics import Moments, TimestepBins


def rows(count, width=5, mean=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return mean + torch.randn(count, width, generator=generator, dtype=torch.float64) @ mix


def moments(*parts):
    found = Moments()
    for part in parts:
        found.update(part)
    return found


def expect(found, whole):
    assert found.count == len(whole)
    np.testing.assert_allclose(found.mean, whole.mean(0), rtol=1e-10)
    np.testing.assert_allclose(found.covariance, np.cov(whole.T.numpy()), rtol=1e-10, atol=1e-10)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) > 1), st.booleans())
def test_moments_are_those_of_one_pass_however_split(sizes, merged):
    whole = rows(sum(sizes))
    parts = whole.split(sizes)
    if merged:
        found = Moments()
        for part in parts:
            found.merge(moments(part))
    else:
        found = moments(*parts)
    expect(found, whole)
    wanted = whole.std(0) / len(whole) ** 0.5
    torch.testing.assert_close(found.standard_error, wanted, rtol=1e-10, atol=0)


def test_a_large_mean_costs_nothing():
    """Where sums of x x^T would leave no digit of the covariance."""
    small = rows(1000)
    found = moments(*(1e9 + small).split(64))
    torch.testing.assert_close(found.covariance, moments(small).covariance, rtol=1e-6, atol=1e-6)


def test_features_of_lower_precision_are_summed_in_float64():
    found = moments(*rows(64).half().split(7))
    assert found.mean.dtype == found.covariance.dtype == torch.float64
    expect(found, rows(64).half().double())


def test_a_file_keeps_the_moments_and_what_they_are_of(tmp_path):
    path = tmp_path / "reference.safetensors"
    before = moments(rows(20))
    before.save(path, "some:features")
    after = Moments.load(path, "some:features")
    assert after.count == 20 and torch.equal(after.mean, before.mean)
    torch.testing.assert_close(after.covariance, before.covariance, rtol=1e-14, atol=0)
    after.update(rows(3, seed=1))
    expect(after, torch.cat([rows(20), rows(3, seed=1)]))
    with pytest.raises(ValueError, match="expected statistics of other:features, got those of some:features"):
        Moments.load(path, "other:features")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"reference.safetensors: expected statistics as --save-statistics writes"):
        Moments.load(path, "some:features")
    with pytest.raises(ValueError, match=r"none.safetensors: expected statistics"):
        Moments.load(tmp_path / "none.safetensors", "some:features")


def test_bad_rows_are_refused():
    with pytest.raises(ValueError, match=r"rows: expected floating point \[B, D\], got torch.int64 \[3\]"):
        Moments().update(torch.arange(3))
    with pytest.raises(ValueError, match="rows: expected 5 columns, as before, got 4"):
        moments(rows(3), rows(3, width=4))
    with pytest.raises(ValueError, match="rows: expected at least 2 for a covariance, got 1"):
        _ = moments(rows(1)).covariance
    with pytest.raises(ValueError, match="rows: expected at least one on some worker, got none"):
        Moments().all_reduce()


EDGES = [0, 100, 400, 1000]


def test_bins_are_the_means_of_a_loop():
    rng = np.random.default_rng(0)
    timesteps, losses = rng.integers(0, 1000, 200), rng.random(200)
    timesteps[:4] = [0, 99, 100, 399]  # a bin holds its lower edge
    bins = TimestepBins(EDGES)
    for part in np.split(np.arange(200), [3, 4, 90]):
        bins.update(torch.from_numpy(timesteps[part]), torch.from_numpy(losses[part]).float())
    figures = bins.read()
    for low, high in pairwise(EDGES):
        wanted = losses.astype(np.float32)[(low <= timesteps) & (timesteps < high)].astype(float).mean()
        assert figures[f"loss/t {low}-{high}"] == pytest.approx(wanted, rel=1e-12)
    assert list(figures) == ["loss/t 0-100", "loss/t 100-400", "loss/t 400-1000"]
    assert bins.read() == {}  # started anew


def test_bins_beyond_the_edges_and_empty_ones():
    bins = TimestepBins([0, 0.25, 0.5, 1])
    bins.update(torch.tensor([-0.1, 1.0, 1.5]), torch.tensor([1.0, 2.0, 4.0]))
    assert bins.read() == {"loss/t 0-0.25": 1.0, "loss/t 0.5-1": 3.0}


def test_a_nan_stays_in_its_bin():
    bins = TimestepBins(EDGES)
    bins.update(torch.tensor([50, 500]), torch.tensor([math.nan, 2.0], requires_grad=True))
    figures = bins.read()
    assert math.isnan(figures["loss/t 0-100"]) and figures["loss/t 400-1000"] == 2.0


def test_an_update_reads_nothing_back():
    """On the meta device a tensor has no values that anything could read."""
    bins = TimestepBins(EDGES)
    bins.update(torch.zeros(8, device="meta"), torch.zeros(8, device="meta"))


def test_bad_bins_are_refused():
    for edges in ([], [0], [0, 0, 1], [1, 0]):
        with pytest.raises(ValueError, match="edges: expected two or more, rising"):
            TimestepBins(edges)
    with pytest.raises(ValueError, match=r"expected two of one shape \[B\], got \[3\] and \[4\]"):
        TimestepBins(EDGES).update(torch.zeros(3), torch.zeros(4))


WORKER = """
import json, sys, torch
import torch.distributed as dist
from kolors_fast.evaluation.statistics import Moments, TimestepBins
from kolors_fast.evaluation.validation_loss import normal, stratified_loss

rank, size = int(sys.argv[2]), int(sys.argv[3])
if size > 1:
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=size)
rows = 100 + torch.randn(23, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
moments, bins = Moments(), TimestepBins([0, 300, 1000])
for row in rows.tensor_split(size)[rank].split(5):
    moments.update(row)
    bins.update(1000 * row[:, 0].frac(), row[:, 1])
moments.all_reduce()
bins.all_reduce()
few = Moments()  # of which the last worker alone has seen rows
if rank == size - 1:
    few.update(rows[:7])
few.all_reduce()

def loss_at(items, times, generators):
    return items * times + normal((len(items), 3), generators).sum(1)

loss = stratified_loss(loss_at, torch.arange(11)[rank::size].split(2), count=3, seed=5, over_workers=True)
if rank == 0:
    print(json.dumps([moments.mean.tolist(), moments.covariance.tolist(), *bins.read().values(), *loss.losses,
                      *loss.errors, loss.total, loss.total_error, few.mean.tolist(), few.covariance.tolist(),
                      few.count, moments.count, loss.items]))
if size > 1:
    dist.destroy_process_group()
"""


def test_several_workers_find_what_one_does(tmp_path):
    def found(size):
        command = [sys.executable, "-c", WORKER, str(tmp_path / f"store{size}")]
        workers = [
            subprocess.Popen([*command, str(rank), str(size)], stdout=subprocess.PIPE, text=True, env=os.environ)
            for rank in range(size)
        ]
        outputs = [worker.communicate(timeout=120)[0] for worker in workers]
        assert [worker.returncode for worker in workers] == [0] * size
        return json.loads(outputs[0])

    alone, together = found(1), found(3)
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-10, atol=1e-12)
    assert together[-3:] == [7, 23, 11]
