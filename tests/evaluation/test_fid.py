"""The Frechet distance against closed forms, and the extractors that a user may name."""

import sys

import numpy as np
import pytest
import torch

from kolors_fast.evaluation.fid import frechet_distance, load_features
from kolors_fast.evaluation.statistics import Moments


def gaussian(mean, covariance, count=1000):
    """Moments of that mean and covariance, exactly."""
    moments = Moments()
    moments.count, moments.mean, moments.scatter = count, mean, covariance * (count - 1)
    return moments


def wishart(width, rank, seed, scale=1.0):
    factor = torch.randn(width, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return scale * factor @ factor.T / rank


def mean(width, seed):
    return torch.randn(width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_gaussians_whose_covariances_commute():
    """There the distance is |m1 - m2|^2 + sum (s1 - s2)^2 of the deviations along the common axes."""
    axes = torch.linalg.qr(wishart(6, 6, 0))[0]
    s1, s2 = torch.tensor([0.0, 1, 2, 3, 4, 5]).double(), torch.tensor([2.0, 0, 1, 1, 4, 9]).double()
    first = gaussian(mean(6, 1), axes @ torch.diag(s1**2) @ axes.T)
    second = gaussian(mean(6, 2), axes @ torch.diag(s2**2) @ axes.T)
    wanted = (mean(6, 1) - mean(6, 2)).square().sum() + (s1 - s2).square().sum()
    assert frechet_distance(first, second) == pytest.approx(float(wanted), rel=1e-12)


@pytest.mark.parametrize(("rank1", "rank2"), [(40, 40), (40, 3), (5, 3)])
def test_any_covariances_by_the_eigenvalues_of_their_product(rank1, rank2):
    """Of C1 C2, which is not symmetric: numpy's eigenvalues, whose roots add up to the trace of its root."""
    width = 40
    c1, c2 = wishart(width, rank1, 1), wishart(width, rank2, 2, scale=7.0)
    roots = np.sqrt(np.linalg.eigvals((c1 @ c2).numpy()).real.clip(min=0))
    wanted = float((mean(width, 3) - mean(width, 4)).square().sum() + c1.trace() + c2.trace()) - 2 * roots.sum()
    found = frechet_distance(gaussian(mean(width, 3), c1), gaussian(mean(width, 4), c2))
    assert found == pytest.approx(wanted, rel=1e-6)  # of the eigenvalues that are zero, numpy's roots are 1e-8


def test_projections_to_one_line():
    """Singular covariances u u^T and v v^T: 2 tr (C1 C2)^1/2 = 2 |u v|."""
    u, v = mean(50, 0), mean(50, 1)
    zero = torch.zeros(50, dtype=torch.float64)
    wanted = u @ u + v @ v - 2 * (u @ v).abs()
    found = frechet_distance(gaussian(zero, torch.outer(u, u)), gaussian(zero, torch.outer(v, v)))
    assert found == pytest.approx(float(wanted), rel=1e-12)


@pytest.mark.parametrize("rank", [60, 4])
def test_a_set_is_nothing_from_itself_and_symmetric(rank):
    first, second = gaussian(mean(60, 0), wishart(60, rank, 0)), gaussian(mean(60, 1), wishart(60, 60, 1))
    assert frechet_distance(first, first) <= 1e-12 * float(first.covariance.trace())
    assert frechet_distance(first, second) == pytest.approx(frechet_distance(second, first), rel=1e-12)


def test_pictures_all_alike_have_a_distance():
    zero = torch.zeros(4, 4, dtype=torch.float64)
    first, second = gaussian(mean(4, 0), zero), gaussian(mean(4, 1), torch.eye(4, dtype=torch.float64))
    wanted = float((mean(4, 0) - mean(4, 1)).square().sum()) + 4
    assert frechet_distance(first, second) == pytest.approx(wanted, rel=1e-12)


def test_the_distance_does_not_depend_on_shards():
    rows = 30 + torch.randn(300, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    reference = gaussian(mean(16, 0), wishart(16, 16, 0))
    found = []
    for shards in (1, 2, 7):
        whole = Moments()
        for shard in range(shards):
            part = Moments()
            for batch in rows[shard::shards].split(11):
                part.update(batch)
            whole.merge(part)
        found.append(frechet_distance(whole, reference))
    assert found[1:] == pytest.approx(found[:1] * 2, rel=1e-10)


def test_widths_that_differ_are_refused():
    with pytest.raises(ValueError, match="expected two sets of one width, got 3 and 4"):
        frechet_distance(gaussian(mean(3, 0), torch.eye(3)), gaussian(mean(4, 0), torch.eye(4)))


MODULE = """
import torch

def colours(pictures):
    return pictures.double().mean((2, 3)) / 255

class Pooled(torch.nn.Module):
    def forward(self, pictures):
        return pictures.float().mean((2, 3), keepdim=True)

def flat(pictures):
    return pictures.float().flatten()

number = 3
"""


@pytest.fixture
def pictures():
    return torch.randint(0, 256, (5, 3, 8, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "extractors_of_a_user.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "extractors_of_a_user"
    sys.modules.pop("extractors_of_a_user", None)


def test_extractors_by_name_and_by_file(module, pictures, tmp_path):
    wanted = pictures.double().mean((2, 3))
    features, name = load_features(f"{module}:colours")
    torch.testing.assert_close(features(pictures), wanted / 255)
    assert name == f"{module}:colours"
    features, _ = load_features(f"{module}:Pooled")
    torch.testing.assert_close(features(pictures), wanted.float())

    made = getattr(sys.modules[module], "Pooled")()  # noqa: B009, it has no such name for mypy
    torch.jit.trace(made, pictures).save(str(tmp_path / "extractor.pt"))
    features, name = load_features(str(tmp_path / "extractor.pt"))
    torch.testing.assert_close(features(pictures[:2]), wanted[:2].float())
    (tmp_path / "extractor.pt").rename(tmp_path / "moved.pt")
    assert name.startswith("sha256:") and load_features(str(tmp_path / "moved.pt"))[1] == name


def test_bad_extractors_are_refused(module, pictures, tmp_path):
    for spec, message in {
        "nothing": r"expected a TorchScript file or 'module.path:callable', got 'nothing'",
        f"{module}:none": "cannot import .* PYTHONPATH",
        "no_such_module_here:f": "cannot import .* PYTHONPATH",
        f"{module}:number": "expected something callable, got .*number, a int",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_features(spec)
    features, _ = load_features(f"{module}:flat")
    with pytest.raises(ValueError, match=rf"expected .*flat to return \[5, D\], got \[{pictures.numel()}\]"):
        features(pictures)
    (tmp_path / "pickle.pt").write_bytes(b"\x80\x04N.")
    with pytest.raises(ValueError, match=r"expected a TorchScript file, got .*pickle\.pt"):
        load_features(str(tmp_path / "pickle.pt"))
