"""Measures of pictures on the disk: what the command tells, alone and by two workers."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from kolors_fast.cli import main
from kolors_fast.evaluation.pictures import Measures, picture_files, read, stacks
from kolors_fast.evaluation.statistics import Moments
from kolors_fast.pipelines.prompts_file.files import save

MODULE = """
def colours(pictures):
    return pictures.double().mean((2, 3)) / 255
"""
FEATURES = "colours_of_a_user:colours"


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    (tmp_path / "colours_of_a_user.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("colours_of_a_user", None)


def pixels(count, seed):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (8, 6 + 2 * (i % 3 == 0), 3), dtype=np.uint8) for i in range(count)]


def folder(path, count, seed):
    for number, picture in enumerate(pixels(count, seed)):
        save(Image.fromarray(picture), path / f"{number:03}.png", {"prompt": f"number {number}"})
    return path


def distance(first, second):
    """The Frechet distance of mean colours, in numpy."""
    a, b = (np.stack([p.reshape(-1, 3).mean(0) / 255 for p in part]) for part in (first, second))
    c1, c2 = np.cov(a.T), np.cov(b.T)
    roots = np.sqrt(np.linalg.eigvals(c1 @ c2).real)
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(c1) + np.trace(c2) - 2 * roots.sum()


def test_pictures_come_in_stacks_of_one_size(tmp_path):
    folder(tmp_path / "drawn", 7, 0)
    (tmp_path / "drawn" / ".005.part.png").write_bytes(b"half")
    files = picture_files(tmp_path / "drawn")
    assert [file.name for file in files] == [f"{n:03}.png" for n in range(7)]
    found = list(stacks(read(files), 2))
    assert [tuple(stack.shape) for stack, _ in found] == [
        (1, 3, 8, 8), (2, 3, 8, 6), (1, 3, 8, 8), (2, 3, 8, 6), (1, 3, 8, 8),
    ]  # fmt: skip
    assert [prompt for _, prompts in found for prompt in prompts] == [f"number {n}" for n in range(7)]
    rows = [picture.permute(1, 2, 0).numpy() for stack, _ in found for picture in stack]
    assert all(np.array_equal(one, other) for one, other in zip(rows, pixels(7, 0), strict=True))


def test_the_command_measures_a_folder_and_keeps_its_statistics(tmp_path, capsys):
    drawn, real = folder(tmp_path / "drawn", 9, 0), folder(tmp_path / "real", 12, 1)
    kept, report = tmp_path / "real.safetensors", tmp_path / "report.json"
    common = ["evaluate", "--features", FEATURES, "--device", "cpu", "--batch", "4"]
    assert main([*common, "--pictures", str(real), "--save-statistics", str(kept)]) == 0
    assert Moments.load(kept, FEATURES).count == 12
    for reference in (real, kept):
        assert main([*common, "--pictures", str(drawn), "--fid", str(reference), "-o", str(report)]) == 0
        figures = json.loads(report.read_text())["measures"]
        assert figures["frechet distance"] == pytest.approx(distance(pixels(9, 0), pixels(12, 1)), rel=1e-9)
        assert figures["pictures"] == 9 and figures["reference pictures"] == 12
        assert "frechet distance: " in capsys.readouterr().out


def test_two_workers_share_a_folder(tmp_path):
    drawn, real = folder(tmp_path / "drawn", 9, 0), folder(tmp_path / "real", 12, 1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["evaluate", "--features", FEATURES, "--pictures", drawn, "--fid", real, "--device", "cpu"]
    workers = []
    for rank in range(2):
        told = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": path, **{name: str(value) for name, value in told.items()}}
        command = [sys.executable, "-m", "kolors_fast.cli", *map(str, arguments)]
        workers.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment))
    first, second = (worker.communicate(timeout=120)[0] for worker in workers)
    assert [worker.returncode for worker in workers] == [0, 0]
    told = dict(line.split(": ") for line in first.splitlines())
    assert float(told["frechet distance"]) == pytest.approx(distance(pixels(9, 0), pixels(12, 1)), rel=1e-5)
    assert told["pictures"] == "9" and told["reference pictures"] == "12"
    assert second == ""  # the first one tells


def test_drawn_pictures_are_measured_too(tmp_path, capsys):
    report = tmp_path / "report.json"
    arguments = ["evaluate", "-n", "4", "--steps", "2", "--device", "cpu", "-o", str(report), "--features", FEATURES]
    assert main([*arguments, "--fid", str(folder(tmp_path / "real", 5, 1))]) == 0
    told = json.loads(report.read_text())
    assert told["all"]["prompts"] == 4 and told["measures"]["pictures"] == 4
    assert f"frechet distance: {told['measures']['frechet distance']:.6g}" in capsys.readouterr().out


class Echo:
    """A CLIP for which pictures are their mean colours and texts the colours that they name."""

    def pictures(self, pictures):
        return pictures.float().mean((2, 3))

    def texts(self, texts):
        return torch.eye(3)[["rgb".index(text) for text in texts]]


def test_the_score_is_the_mean_over_pictures_and_their_prompts():
    measures = Measures(batch=2)
    measures.clip = Echo()
    colours = [(255, 0, 0), (0, 9, 0), (0, 0, 7), (3, 0, 4)]
    measures.update((Image.new("RGB", (4, 4), colour), prompt) for colour, prompt in zip(colours, "rrbb", strict=True))
    scores = np.array([100, 0, 100, 80])
    figures = measures.figures()
    assert figures["clip score"] == pytest.approx(scores.mean())
    assert figures["clip score error"] == pytest.approx(scores.std(ddof=1) / 2)
    with pytest.raises(ValueError, match=r"--clip: expected pictures that .* drew, got one with no prompt"):
        measures.update([(Image.new("RGB", (4, 4)), None)])


def test_what_cannot_be_measured_is_refused(tmp_path, capsys):
    drawn = str(folder(tmp_path / "drawn", 3, 0))
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no picture")
    paired = "--features: expected together with --fid or --save-statistics, got one without the other"
    for arguments, message in (
        (["--pictures", drawn], "--pictures: expected --features or --clip with it, got neither"),
        (["--pictures", drawn, "--features", FEATURES], paired),
        (["--fid", drawn], paired),
        (
            ["--pictures", str(tmp_path / "empty"), "--features", FEATURES, "--fid", drawn],
            "empty: expected a folder of",
        ),
        (["--pictures", str(tmp_path / "broken"), "--features", FEATURES, "--fid", drawn], "a.png: expected a picture"),
    ):
        assert main(["evaluate", "--device", "cpu", *arguments]) == 1
        assert message in capsys.readouterr().err
