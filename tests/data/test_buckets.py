"""Aspect-ratio buckets against the sizes the original algorithm makes."""

import numpy as np
import pytest

from kolors_fast.data.buckets import assign_bucket, epoch_batches, make_buckets, nearest_bucket

# width x height at an area of 1024^2, sides 512 to 2048 (facts of NovelAI's code run with these settings)
WIDE = [
    (1088, 960), (1152, 896), (1216, 832), (1280, 768), (1344, 768), (1408, 704), (1472, 704), (1536, 640),
    (1600, 640), (1664, 576), (1728, 576), (1792, 576), (1856, 512), (1920, 512), (1984, 512), (2048, 512),
]  # fmt: skip


def test_the_33_buckets_of_a_megapixel():
    expected = {(1024, 1024)} | set(WIDE) | {(h, w) for w, h in WIDE}
    buckets = make_buckets(1024**2, 512, 2048)
    assert len(buckets) == 33
    assert {(width, height) for height, width in buckets} == expected
    assert [width for _, width in buckets] == sorted(width for _, width in buckets)


@pytest.mark.parametrize(("shortest", "longest", "count"), [(512, 1536, 21), (256, 2048, 41)])
def test_counts_at_other_limits(shortest, longest, count):
    assert len(make_buckets(1024**2, shortest, longest)) == count


def original(area, shortest, longest, base, divisor=64):
    """The original's loop over widths, then over heights; sizes are (width, height) as there."""
    found = []
    for swapped in (False, True):
        one = shortest
        while one * shortest <= area and one <= longest:
            other, base_seen = shortest, False
            while one * (other + divisor) <= area and other + divisor <= longest:
                base_seen |= (one, other) == base
                other += divisor
            if base_seen:
                found.append(base)
            found.append((other, one) if swapped else (one, other))
            one += divisor
    return sorted(set(found), key=lambda size: size[0] * 4096 - size[1])


@pytest.mark.parametrize(
    ("area", "shortest", "longest", "base", "count"),
    [
        (768 * 512, 256, 1024, (512, 512), 19),  # the original's own settings
        (1024**2, 512, 2048, (1024, 1024), 33),
        (1024**2, 512, 1536, (1024, 1024), 21),
        (1024**2, 256, 2048, (1024, 1024), 41),
        (512**2, 256, 1024, (512, 512), None),
    ],
)
def test_the_same_as_the_original(area, shortest, longest, base, count):
    expected = original(area, shortest, longest, base)
    buckets = make_buckets(area, shortest, longest, base=base)
    assert [(width, height) for height, width in buckets] == expected
    assert count is None or len(buckets) == count


def test_bundled_sizes():
    assert make_buckets(256**2, 192, 320) == [(320, 192), (256, 256), (192, 320)]
    assert make_buckets(128**2, 128, 128) == [(128, 128)]


def test_refuses_impossible_limits():
    with pytest.raises(ValueError, match="shortest: expected a multiple of 64"):
        make_buckets(256**2, 100, 320)
    with pytest.raises(ValueError, match="shortest"):
        make_buckets(256**2, 320, 512)
    with pytest.raises(ValueError, match="longest: expected the base's side 1024 or more, got 512"):
        make_buckets(1024**2, 512, 512)


def test_assignment_is_by_ratio_not_its_logarithm():
    buckets = [(256, 256), (128, 512)]  # aspects 1 and 4: the middle is 2.5, not 2
    assert nearest_bucket(buckets, 2.4) == 0
    assert nearest_bucket(buckets, 2.6) == 1
    assert nearest_bucket(make_buckets(1024**2, 512, 2048), 1.0) == 16


def test_a_far_aspect_ratio_fits_no_bucket():
    buckets = [(64, 256), (128, 128), (256, 64)]  # aspects 4, 1 and 1/4
    assert assign_bucket(buckets, (100, 799)) == 0
    assert assign_bucket(buckets, (100, 800)) is None  # 8 - 4 is no less than 4
    assert assign_bucket(buckets, (10000, 1)) == 2  # a ratio has no large error on this side
    assert assign_bucket(buckets, (100, 120), max_error=0.1) is None


def test_an_epoch_uses_each_item_once_in_whole_batches():
    members = [np.arange(0, 50), np.arange(50, 57), np.arange(57, 57), np.arange(57, 200)]
    buckets, items = epoch_batches(members, 8, np.random.default_rng(3))
    assert items.shape == (50 // 8 + 7 // 8 + 143 // 8, 8) and buckets.shape == items.shape[:1]
    assert len(set(items.flatten().tolist())) == items.size
    for bucket, ids in zip(buckets, items, strict=True):
        assert np.isin(ids, members[bucket]).all()


def test_an_epoch_of_nothing():
    for members in ([], [np.arange(7)]):
        buckets, items = epoch_batches(members, 8, np.random.default_rng(0))
        assert len(buckets) == 0 and items.shape == (0, 8)


def test_epochs_follow_their_generator():
    members = [np.arange(40), np.arange(40, 100)]

    def run(seed):
        return [part.tolist() for part in epoch_batches(members, 8, np.random.default_rng(seed))]

    assert run(1) == run(1)
    assert run(1) != run(2)
    one, two = ({tuple(sorted(ids)) for ids in run(seed)[1]} for seed in (1, 2))
    assert not one & two  # other items together, not only another order of batches


def test_buckets_are_drawn_by_their_items_left():
    members = [np.arange(90 * 4), np.arange(90 * 4, 100 * 4)]
    first = [epoch_batches(members, 4, np.random.default_rng(seed))[0][0] for seed in range(400)]
    assert np.mean(first) == pytest.approx(0.1, abs=4 * (0.1 * 0.9 / 400) ** 0.5)
