"""What a step draws from a folder of features, the order of its epochs, and what is said of a broken folder."""

import json
import warnings

import pytest
import torch

from kolors_fast.data.features import FeatureDataset, FeaturesError
from kolors_fast.data.precompute import Settings, precompute
from kolors_fast.data.sources import Sample
from kolors_fast.training.streams import Streams

SETTINGS = Settings(area=128, shortest=64, longest=256, batch=4, shard=5)
SIZES = [(100, 100), (100, 100), (60, 180)]  # two thirds square


@pytest.fixture
def folder(tmp_path, png, encoder):
    samples = []
    for n in range(33):
        height, width = SIZES[n % 3]
        samples.append(Sample(str(n), f"o{n}", f"s{n}", {}, lambda h=height, w=width, n=n: png(h, w, n)))
    precompute(samples, encoder, tmp_path, SETTINGS)
    return tmp_path


@pytest.fixture
def opened(folder, encoder):
    def make(**options):
        return FeatureDataset(folder, encoder.captions, **options)

    return make


def keys_of(dataset, bucket, items):
    keys = [key for shard in dataset.index["shards"] if tuple(shard["size"]) == bucket.size for key in shard["keys"]]
    return [keys[item] for item in items]


STREAMS = Streams(0, "stage")


def test_buckets(opened):
    dataset = opened()
    assert len(dataset) == 33 and [(b.size, len(b)) for b in dataset.buckets] == [((64, 192), 11), ((128, 128), 22)]


def test_latents_are_drawn_from_the_posterior(opened):
    bucket = opened().buckets[1]
    items = torch.tensor([0, 7, 21, 7])
    draws = torch.stack([bucket.draw(items, STREAMS.noise(step, 4, bucket.shape)) for step in range(500)])
    assert draws.dtype == torch.float32 and draws.shape == (500, 4, 3, 16, 16)
    assert torch.equal(draws[3], bucket.draw(items, STREAMS.noise(3, 4, bucket.shape)))
    shards = [shard.tensors()["mean"] for shard in bucket.shards]
    mean = torch.cat(shards)[items].float()
    assert (draws.mean(0) - mean).abs().max() < 6 * 0.5 / 500**0.5
    assert float((draws - mean).std()) == pytest.approx(0.5, rel=0.01)


def test_captions_and_sizes_are_those_of_the_items(opened):
    dataset = opened()
    for step in range(5):
        bucket, items = dataset.batch(step, 4)
        keys = keys_of(dataset, bucket, items)
        choice, dropped = torch.tensor([0, 1, 0, 1]), torch.tensor([False, False, True, True])
        assert bucket.texts(items, choice, dropped) == [f"o{keys[0]}", f"s{keys[1]}", "", ""]
        for key, row in zip(keys, bucket.time_ids(items).tolist(), strict=True):
            assert row[:2] == [float(side) for side in SIZES[int(key) % 3]] and tuple(row[4:]) == bucket.size


def test_a_batch_mixes_captions_and_drops_some(opened):
    for share in (0.0, 0.5, 0.8):
        dataset, counts = opened(synthetic=share), {"o": 0, "s": 0, "": 0}
        for step in range(300):
            batch = dataset.draw(step, 4, 0.1, STREAMS)
            for text in batch.texts:
                counts[text[:1]] += 1
        assert counts[""] / 1200 == pytest.approx(0.1, abs=4 * (0.1 * 0.9 / 1200) ** 0.5)
        kept = counts["o"] + counts["s"]
        assert counts["s"] / kept == pytest.approx(share, abs=4 * (share * (1 - share) / kept) ** 0.5)


def test_a_batch_follows_its_step_and_generators(opened):
    for step in (0, 3, 11):
        one, two = (opened(seed=2).draw(step, 4, 0.1, STREAMS) for _ in range(2))
        assert one.size == two.size and one.texts == two.texts
        assert torch.equal(one.latents, two.latents) and torch.equal(one.time_ids, two.time_ids)


def visited(dataset, steps, size=4):
    return [
        (bucket.size, tuple(keys_of(dataset, bucket, items)))
        for bucket, items in map(dataset.batch, steps, [size] * len(steps))
    ]


def test_an_epoch_visits_each_sample_at_most_once(opened):
    per_epoch = 22 // 4 + 11 // 4
    epochs = [visited(opened(), range(per_epoch * e, per_epoch * (e + 1))) for e in range(2)]
    for batches in epochs:
        keys = [key for _, batch in batches for key in batch]
        assert len(set(keys)) == len(keys) == 4 * per_epoch
    assert epochs[0] != epochs[1]
    assert visited(opened(), range(7)) != visited(opened(seed=1), range(7))


@pytest.mark.parametrize("size", [2, 4])
def test_processes_read_parts_of_the_same_batch(opened, size):
    for step in range(5):
        whole = opened().draw(step, 4, 0.3, STREAMS)
        parts = [opened().draw(step, 4, 0.3, Streams(0, "stage", rank, size)) for rank in range(size)]
        assert [text for part in parts for text in part.texts] == whole.texts
        for name in ("latents", "noise", "time_ids"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
        assert not torch.equal(whole.latents, whole.noise)


def test_a_resumed_run_sees_the_same_batches(opened):
    whole = visited(opened(), range(20))
    assert visited(opened(), range(9, 20)) == whole[9:]


def test_a_size_with_too_few_samples_is_told(opened):
    with pytest.warns(UserWarning, match=r"11 of 33 samples are never drawn: .* a batch of 12 of their size, 64x192"):
        bucket, _ = opened().batch(0, 12)
    assert bucket.size == (128, 128)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened().batch(0, 11)


def test_fewer_samples_than_a_batch(opened):
    with pytest.raises(ValueError, match=r"batch: .* in .*, where the most are 22 of 33, got 23"):
        opened().batch(0, 23)


def test_an_empty_folder_of_features(tmp_path, encoder):
    precompute([], encoder, tmp_path, SETTINGS)
    dataset = FeatureDataset(tmp_path, encoder.captions, verify=True)
    assert len(dataset) == 0
    with pytest.raises(ValueError, match="where the most are 0 of 0, got 1"):
        dataset.batch(0, 1)


def spoil(folder, dataset, number):
    path = folder / dataset.index["shards"][number]["file"]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return path


def test_a_broken_shard_is_found_when_it_is_read(folder, opened):
    dataset = opened()
    path = spoil(folder, dataset, 1)
    message = f"the shard {path} is broken: expected sha256 "
    bucket = dataset.buckets[0]
    bucket.time_ids(torch.tensor([0, 4]))  # of the shard before
    with pytest.raises(FeaturesError, match=message):
        bucket.time_ids(torch.tensor([0, 5]))
    with pytest.raises(FeaturesError, match=message):
        opened(verify=True)


def test_a_missing_shard(folder, opened):
    dataset = opened()
    path = folder / dataset.index["shards"][0]["file"]
    path.unlink()
    with pytest.raises(FeaturesError, match=f"the shard {path}, of which the index tells, is missing"):
        dataset.buckets[0].time_ids(torch.tensor([0]))


def test_the_wrong_index(folder, opened, encoder):
    assert opened(model="0" * 64)
    with pytest.raises(
        FeaturesError, match="expected features of models with the hash 111111111111, got Stub 'stub', 0000"
    ):
        opened(model="1" * 64)
    with pytest.raises(ValueError, match="synthetic: expected a probability, 0 to 1, got 2"):
        opened(synthetic=2)
    index = folder / "index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "format": 2}))
    with pytest.raises(FeaturesError, match="format: expected 1, got 2"):
        opened()
    index.write_text("{")
    with pytest.raises(FeaturesError, match=r"index.json is no JSON"):
        opened()
    index.unlink()
    with pytest.raises(FeaturesError, match=r"index.json is missing: expected a folder"):
        opened()


def test_shards_are_mapped_not_loaded(tmp_path, encoder):
    """What a process holds of a large shard is what it has read."""
    from safetensors.torch import save_file

    from kolors_fast.data.features import _mapped

    path = tmp_path / "large.safetensors"
    save_file({"mean": torch.zeros(64, 2**20)}, path)  # 256 MiB

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    before = resident()
    assert float(_mapped(path, "")["mean"][3].sum()) == 0
    assert resident() - before < 64 * 2**20
