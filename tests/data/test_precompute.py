"""The folder of features: what is in it, resuming after a kill, several processes, and what is refused."""

import hashlib
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kolors_fast.data.metadata import Filter
from kolors_fast.data.pictures import fit_picture, open_picture
from kolors_fast.data.precompute import Settings, precompute
from kolors_fast.data.sources import Sample, Skipped

SETTINGS = Settings(area=128, shortest=64, longest=256, batch=2, shard=3)


@pytest.fixture
def samples(png):
    """20 samples in three sizes, some with one caption; then ones that are skipped or dropped."""
    sizes = [(100, 100), (60, 180), (180, 60)]
    found = []
    for n in range(20):
        height, width = sizes[(n + n // 4) % 3]
        captions = (
            (f"caption {n}", f"synthetic {n}")
            if n % 4
            else ((f"caption {n}", None), (None, f"synthetic {n}"))[n % 8 // 4]
        )
        found.append(Sample(f"key {n}", *captions, {"quality": n % 6}, lambda h=height, w=width, n=n: png(h, w, n)))
    found.insert(4, Skipped("lost", "no caption"))
    found.insert(9, Sample("broken", "text", None, {"quality": 5}, lambda: b"nothing"))
    found.insert(11, Sample("key 2", "again", None, {"quality": 5}, lambda: png(100, 100)))
    found.insert(15, Sample("long", "text", None, {"quality": 5}, lambda: png(10, 100)))
    return found


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_what_is_stored(tmp_path, samples, encoder):
    assert precompute(samples, encoder, tmp_path, SETTINGS)
    index = json.loads((tmp_path / "index.json").read_text())
    assert index["model"] == encoder.identity
    dropped = {"aspect ratio": 1}
    assert index["counts"] == {"samples": 24, "encoded": 20, "skipped": 3, "dropped": dropped}
    skipped = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [one["key"] for one in skipped] == ["lost", "broken", "key 2"]
    assert skipped[1]["reason"].startswith("picture: not decodable")
    by_key = {one.key: one for one in reversed(samples) if isinstance(one, Sample)}
    seen = []
    for shard in index["shards"]:
        content = (tmp_path / shard["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == shard["sha256"]
        assert shard["count"] == len(shard["keys"]) <= 3
        stored = load_file(tmp_path / shard["file"])
        captions = encoder.captions(*(stored[f"captions.{name}"] for name in ("states", "starts", "total")))
        for row, key in enumerate(shard["keys"]):
            sample = by_key[key]
            image = open_picture(sample.read())
            pixels, crop = fit_picture(image, tuple(shard["size"]), key)
            mean, std = encoder.encode_pictures(pixels[None])
            torch.testing.assert_close(stored["mean"][row], mean[0].half(), rtol=0, atol=0)
            torch.testing.assert_close(stored["std"][row], std[0].half(), rtol=0, atol=0)
            assert stored["sizes"][row].tolist() == [image.height, image.width, *crop, *shard["size"]]
            original, synthetic = captions.gather(stored["rows"][row])
            assert original == (sample.caption or sample.synthetic_caption)
            assert synthetic == (sample.synthetic_caption or sample.caption)
        seen += shard["keys"]
    assert sorted(seen) == sorted(f"key {n}" for n in range(20))
    sizes = {tuple(shard["size"]) for shard in index["shards"]}
    assert sizes == {(128, 128), (64, 192), (192, 64)} and len(index["shards"]) > len(sizes)


class Killed(Exception):
    pass


@pytest.mark.parametrize("after", [1, 5, 8, 13, 21, 24])
def test_a_killed_run_goes_on_and_makes_the_same_files(tmp_path, samples, encoder, after):
    precompute(samples, encoder, tmp_path / "whole", SETTINGS)

    def until_killed():
        yield from samples[:after]
        raise Killed

    with pytest.raises(Killed):
        precompute(until_killed(), encoder, tmp_path / "killed", SETTINGS)
    assert not (tmp_path / "killed" / "index.json").exists()
    with (tmp_path / "killed" / "finished-0.jsonl").open("ab") as journal:
        journal.write(b'{"file": "half a li')
    finished = len(list((tmp_path / "killed").glob("*x*.safetensors"))) * SETTINGS.shard
    encoder.encoded = 0
    precompute(samples, encoder, tmp_path / "killed", SETTINGS)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert encoder.encoded == 20 - finished


def test_a_finished_run_encodes_nothing_again(tmp_path, samples, encoder):
    precompute(samples, encoder, tmp_path, SETTINGS)
    before = contents(tmp_path)
    encoder.encoded = 0
    precompute(samples, encoder, tmp_path, SETTINGS)
    assert encoder.encoded == 0 and contents(tmp_path) == before


def test_a_broken_shard_alone_is_made_again(tmp_path, samples, encoder):
    precompute(samples, encoder, tmp_path, SETTINGS)
    before = contents(tmp_path)
    names = sorted(name for name in before if "x" in name and name.endswith("00000.safetensors"))
    (tmp_path / names[0]).write_bytes(before[names[0]][:-1] + b"?")
    (tmp_path / names[1]).unlink()
    encoder.encoded = 0
    precompute(samples, encoder, tmp_path, SETTINGS)
    assert encoder.encoded == 6
    after = contents(tmp_path)
    journal = "finished-0.jsonl"  # has them at its end now
    assert sorted(after.pop(journal).splitlines()) == sorted(before.pop(journal).splitlines())
    assert after == before


def test_more_samples_are_added(tmp_path, samples, encoder):
    precompute(samples[:14], encoder, tmp_path, SETTINGS)
    encoder.encoded = 0
    precompute(samples, encoder, tmp_path, SETTINGS)
    index = json.loads((tmp_path / "index.json").read_text())
    assert sorted(key for shard in index["shards"] for key in shard["keys"]) == sorted(f"key {n}" for n in range(20))
    assert encoder.encoded == 9 and index["counts"]["encoded"] == 20


def test_processes_share_the_samples(tmp_path, samples, encoder):
    precompute(samples, encoder, tmp_path / "one", SETTINGS)
    assert not precompute(samples, encoder, tmp_path / "two", SETTINGS, rank=1, world=2)
    assert not (tmp_path / "two" / "index.json").exists()
    assert precompute(samples, encoder, tmp_path / "two", SETTINGS, rank=0, world=2)
    one, two = (json.loads((tmp_path / name / "index.json").read_text()) for name in ("one", "two"))
    keys = [
        [key for shard in two["shards"] if f"-{rank}-" in shard["file"] for key in shard["keys"]] for rank in (0, 1)
    ]
    assert not set(keys[0]) & set(keys[1])
    known = [one.key for one in samples]
    assert all(known.index(key) % 2 == rank for rank in (0, 1) for key in keys[rank])
    assert two["counts"] == one["counts"]


def test_a_process_that_begins_again_is_not_done(tmp_path, samples, encoder):
    for rank in range(2):
        precompute(samples, encoder, tmp_path, SETTINGS, rank, world=2)
    (tmp_path / "index.json").unlink()

    def killed():
        raise Killed
        yield

    with pytest.raises(Killed):
        precompute(killed(), encoder, tmp_path, SETTINGS, 0, world=2)
    assert not precompute(samples, encoder, tmp_path, SETTINGS, 1, world=2)
    assert not (tmp_path / "index.json").exists()


def test_the_filter(tmp_path, samples, encoder):
    rules = Filter({"quality": {"min": 4}, "width": {"min": 100}})
    precompute(samples, encoder, tmp_path, Settings(128, 64, 256, 2, filter=rules))
    index = json.loads((tmp_path / "index.json").read_text())
    kept = [key for shard in index["shards"] for key in shard["keys"]]
    good = [n for n in range(20) if n % 6 >= 4]
    wide = [n for n in good if (n + n // 4) % 3 != 2]
    assert sorted(kept) == sorted(f"key {n}" for n in wide)
    expected = {"aspect ratio": 1, "quality below 4": 20 - len(good), "width below 100": len(good) - len(wide)}
    assert index["counts"]["dropped"] == expected
    assert index["settings"]["filter"] == rules.table


def test_other_settings_are_refused(tmp_path, samples, encoder):
    precompute(samples, encoder, tmp_path, SETTINGS)
    with pytest.raises(ValueError, match=r"area: expected 128, with which .* was begun, got 256"):
        precompute(samples, encoder, tmp_path, Settings(256, 64, 256, 2, 3))
    with pytest.raises(ValueError, match=r"processes: expected 1, with which .* was begun, got 2"):
        precompute(samples, encoder, tmp_path, SETTINGS, world=2)
    encoder.identity = {**encoder.identity, "name": "another"}
    with pytest.raises(ValueError, match=r"model: expected .*'stub'.*, with which .* was begun, got .*'another'"):
        precompute(samples, encoder, tmp_path, SETTINGS)
    with pytest.raises(ValueError, match="batch: expected 1 or more, got 0"):
        Settings(batch=0)


def test_no_samples_make_an_empty_index(tmp_path, encoder):
    precompute([], encoder, tmp_path, SETTINGS)
    index = json.loads((tmp_path / "index.json").read_text())
    assert index["shards"] == [] and index["counts"]["encoded"] == 0


def test_no_half_file_is_left(tmp_path, samples, encoder, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("kolors_fast.data.precompute.os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        precompute(samples, encoder, tmp_path, SETTINGS)
    assert contents(tmp_path) == {}


def test_settings_name_the_buckets():
    assert len(Settings().buckets()) == 33
    assert np.prod(Settings().buckets(), axis=1).max() == 1024**2
