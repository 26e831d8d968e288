"""The stratified loss against integrals in closed form, numpy's errors, and itself in other batches."""

import numpy as np
import pytest
import torch

from kolors_fast.evaluation.validation_loss import normal, stratified_loss


def test_times_are_the_midpoints_and_the_total_is_the_integral():
    seen = []

    def loss_at(items, times, generators):
        seen.append(float(times[0]))
        return times.double() ** 2

    found = stratified_loss(loss_at, [torch.arange(3)], count=8)
    assert seen == [(2 * i + 1) / 16 for i in range(8)] == list(found.times)
    assert found.total == pytest.approx(1 / 3 - 1 / (12 * 64), rel=1e-9)  # the midpoint rule's error, h^2 / 12 of 2
    assert found.total_error == 0 and found.items == 3


def loss_of_noise(items, times, generators):
    noise = normal((len(items), 4, 8), generators)
    return (noise * times.view(-1, 1, 1)).square().mean((1, 2)) + items


def test_noise_is_that_of_the_item_and_the_time():
    """In any order and any batches: an item's losses are its own."""
    whole = stratified_loss(loss_of_noise, [torch.arange(10)], count=4, seed=1)
    again = stratified_loss(loss_of_noise, torch.arange(10).flip(0).split(3), count=4, seed=1)
    assert again.losses == pytest.approx(whole.losses, rel=1e-12)
    assert again.total_error == pytest.approx(whole.total_error, rel=1e-10)
    other = stratified_loss(loss_of_noise, [torch.arange(10)], count=4, seed=2)
    assert all(one != two for one, two in zip(other.losses, whole.losses, strict=True))


def test_no_two_of_items_times_and_seeds_share_their_noise():
    drawn = []

    def loss_at(items, times, generators):
        drawn.extend(normal((len(items), 2), generators)[:, 0].tolist())
        return times

    for seed in (0, 1):
        stratified_loss(loss_at, torch.arange(6).split(4), count=3, seed=seed)
    assert len(drawn) == len(set(drawn)) == 36


def test_standard_errors_are_numpys():
    table = np.random.default_rng(0).random((7, 5)) + np.arange(7)[:, None]  # items differ, so times go together

    def loss_at(items, times, generators):
        return torch.from_numpy(table[items.numpy(), int(times[0] * 5)])

    found = stratified_loss(loss_at, torch.arange(7).split(2), count=5)
    np.testing.assert_allclose(found.losses, table.mean(0))
    np.testing.assert_allclose(found.errors, table.std(0, ddof=1) / 7**0.5)
    assert found.total == pytest.approx(table.mean())
    assert found.total_error == pytest.approx(table.mean(1).std(ddof=1) / 7**0.5)


def test_figures_are_named_by_time():
    found = stratified_loss(lambda items, times, generators: times, [torch.arange(2)], count=2)
    wanted = {"validation loss": 0.5, "validation loss error": 0, "validation loss/t 0.25": 0.25}
    assert found.figures() == pytest.approx(wanted | {"validation loss/t 0.75": 0.75})


def test_no_gradient_is_kept():
    weight = torch.ones((), requires_grad=True)

    def loss_at(items, times, generators):
        assert not (weight * times).requires_grad
        return times

    stratified_loss(loss_at, [torch.arange(2)])


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="count: expected at least 1, got 0"):
        stratified_loss(loss_of_noise, [torch.arange(3)], count=0)
    with pytest.raises(ValueError, match=r"loss_at: expected losses \[3\], got \[\]"):
        stratified_loss(lambda items, times, generators: times.mean(), [torch.arange(3)])
    with pytest.raises(ValueError, match="rows: expected at least 2 for a covariance, got 1"):
        stratified_loss(loss_of_noise, [torch.arange(1)])
    with pytest.raises(ValueError, match="generators: expected one a sample, 3, got 0"):
        normal((3, 2), [])
