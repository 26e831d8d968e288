"""The same samples from a folder, tar shards and Parquet shards; what is broken is told and left out."""

import io
import json
import tarfile

import numpy as np
import pytest

from kolors_fast.data.pictures import PictureError
from kolors_fast.data.sources import Sample, Skipped, read_source


def seen(path):
    """Key -> (captions, metadata, picture's size), or the reason why not."""
    found = {}
    for one in read_source(path):
        if isinstance(one, Sample):
            try:
                what = one.caption, one.synthetic_caption, one.metadata, one.picture().size
            except PictureError as error:
                what = str(error)
        else:
            what = one.reason
        assert one.key not in found
        found[one.key] = what
    return found


def write_tar(path, files, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.fixture
def files(png):
    """Two good samples, and one each without picture, caption, valid JSON and whole picture."""
    both = {"caption": "one", "synthetic_caption": "eins", "quality": 5}
    return {
        "a/1.png": png(20, 30),
        "a/1.json": json.dumps(both).encode(),
        "a/2.png": png(10, 10),
        "a/2.txt": " zwei 二\n".encode(),
        "a/3.txt": b"no picture",
        "a/4.png": png(10, 10),
        "a/5.png": png(10, 10),
        "a/5.json": b"{",
        "a/6.png": png(40, 40)[:-900],
        "a/6.txt": b"cut",
        "a/7.png": png(10, 10),
        "a/7.json": b'{"caption": 7}',
    }


GOOD = [("one", "eins", {"quality": 5}, (30, 20)), ("zwei 二", None, {}, (10, 10))]


def check_broken(found, suffix):
    assert [found[f"a/{n}{suffix}"] for n in (1, 2)] == GOOD
    assert found[f"a/4{suffix}"] == "no caption"
    assert found[f"a/5{suffix}"].startswith("metadata: Expecting property name")
    assert found[f"a/6{suffix}"].startswith("not decodable")
    assert found[f"a/7{suffix}"] == "caption: expected a string, got a int"


def test_a_folder_of_pictures(tmp_path, files):
    (tmp_path / "a").mkdir()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / ".hidden.png").write_bytes(b"")
    found = seen(tmp_path)
    check_broken(found, ".png")
    assert list(found) == [f"a/{n}.png" for n in (1, 2, 4, 5, 6, 7)]


@pytest.mark.parametrize(("name", "mode"), [("x.tar", "w"), ("x.tar.gz", "w:gz")])
def test_tar_shards(tmp_path, files, name, mode):
    write_tar(tmp_path / name, files, mode)
    found = {key.removeprefix(f"{name}/"): what for key, what in seen(tmp_path / name).items()}
    check_broken(found, "")
    assert found["a/3"] == "no picture among .txt"
    assert seen(tmp_path) == seen(tmp_path / name)  # a folder of shards, of which there is one


def test_names_up_to_the_first_dot_make_a_tar_sample(tmp_path, png):
    write_tar(tmp_path / "x.tar", {"a.b/1.png": png(8, 8), "a.b/1.seg.txt": b"no caption", "a.b/1.txt": b"caption"})
    assert seen(tmp_path) == {"x.tar/a.b/1": ("caption", None, {}, (8, 8))}


def test_a_truncated_tar_gives_what_is_whole(tmp_path, png):
    write_tar(tmp_path / "x.tar", {f"{n}.{s}": d for n in range(3) for s, d in (("png", png(40, 40)), ("txt", b"t"))})
    whole = (tmp_path / "x.tar").read_bytes()
    with tarfile.open(tmp_path / "x.tar") as archive:
        cut = archive.getmember("2.png").offset_data + 100
    (tmp_path / "x.tar").write_bytes(whole[:cut])
    found = seen(tmp_path)
    assert [key for key, what in found.items() if what == ("t", None, {}, (40, 40))] == ["x.tar/0", "x.tar/1"]
    assert found["x.tar/2"] == "not readable from here on: unexpected end of data"
    (tmp_path / "x.tar").write_bytes(b"no tar")
    assert seen(tmp_path)["x.tar"].startswith("not readable from here on: ")


def test_a_list_in_jsonl(tmp_path, png):
    (tmp_path / "1.png").write_bytes(png(20, 30))
    rows = [
        {"file_name": "1.png", "caption": "one", "synthetic_caption": "eins", "quality": 5},
        {"file_name": "none.png", "caption": "lost"},
        {"caption": "no file"},
    ]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "metadata.jsonl").write_text("\n".join([*lines, "", "[1]", "{"]))
    found = seen(tmp_path)
    assert found["1.png"] == GOOD[0]
    assert found["none.png"].startswith("not readable: ") and "No such file" in found["none.png"]
    assert found["metadata.jsonl:3"] == "file_name: expected a string, got None"
    assert found["metadata.jsonl:5"] == "metadata: expected a JSON object, got a list"
    assert found["metadata.jsonl:6"].startswith("metadata: Expecting property name")


def write_parquet(path, rows):
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow, which is no dependency")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.mark.parametrize("wrapped", [False, True])
def test_parquet_shards(tmp_path, png, wrapped):
    pictures = [png(20, 30), png(10, 10), None, png(40, 40)[:-900]]
    rows = [
        {"image": {"bytes": data, "path": None} if wrapped else data, "caption": text, "synthetic_caption": None}
        for data, text in zip(pictures, ["one", "", "two", "three"], strict=True)
    ]
    rows[0] |= {"synthetic_caption": "eins", "quality": 5}
    write_parquet(tmp_path / "x.parquet", rows)
    found = seen(tmp_path)
    assert found["x.parquet/0"] == GOOD[0]
    assert found["x.parquet/1"] == "no caption"
    assert found["x.parquet/2"] == "no picture in the column 'image'"
    assert found["x.parquet/3"].startswith("not decodable")
    assert seen(tmp_path / "x.parquet") == found
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and no more")
    assert seen(tmp_path)["x.parquet/0"].startswith("not readable from here on: ")


def test_a_list_in_parquet(tmp_path, png):
    (tmp_path / "1.png").write_bytes(png(20, 30))
    row = {"file_name": "1.png", "caption": "one", "synthetic_caption": "eins", "quality": 5}
    write_parquet(tmp_path / "metadata.parquet", [row])
    assert seen(tmp_path) == {"1.png": GOOD[0]}


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "x.parquet").write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"x.parquet is a Parquet file, which needs pyarrow: pip install"):
        list(read_source(tmp_path))


def test_nothing_of_the_kind(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match="data: expected pictures"):
            read_source(path)


def test_keys_do_not_depend_on_the_folder(tmp_path, png):
    keys = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for order in np.random.default_rng(ord(name)).permutation(5):
            (tmp_path / name / f"{order}.png").write_bytes(png(8, 8))
            (tmp_path / name / f"{order}.txt").write_text("text")
        keys.append([one.key for one in read_source(tmp_path / name)])
    assert keys[0] == keys[1] == [f"{n}.png" for n in range(5)]
    assert not any(isinstance(one, Skipped) for one in read_source(tmp_path / "a"))
