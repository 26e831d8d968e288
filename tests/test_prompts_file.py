"""`generate --prompts-file`: every good line is a picture once, whatever happens on the way; every bad one is told."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributed import TCPStore

from kolors_fast.cli import main
from kolors_fast.ops import use_backend
from kolors_fast.pipelines.kolors import KolorsPipeline
from kolors_fast.pipelines.prompts_file import Defaults, Worker
from kolors_fast.pipelines.prompts_file.batches import grouped
from kolors_fast.pipelines.prompts_file.requests import Request, read_requests

QUICK = ["--steps", "1", "--height", "64", "--width", "64", "--device", "cpu"]
Draw = Callable[..., int]
_LOADED: dict[Any, KolorsPipeline] = {}


@pytest.fixture(autouse=True)
def _loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    load = KolorsPipeline.from_pretrained

    def cached(model: str, torch_dtype: torch.dtype, **options: Any) -> KolorsPipeline:
        if (model, torch_dtype) not in _LOADED:
            _LOADED[model, torch_dtype] = load(model, torch_dtype=torch_dtype, **options)
        return _LOADED[model, torch_dtype]

    monkeypatch.setattr(KolorsPipeline, "from_pretrained", cached)


@pytest.fixture(autouse=True)
def _no_other_worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    yield
    use_backend(None)


@pytest.fixture
def draw(tmp_path: Path) -> Draw:
    """Write the lines to a file, a list of objects as JSON Lines, and run the command on it."""

    def run(lines: str | list[Any], *arguments: str) -> int:
        file = tmp_path / ("p.txt" if isinstance(lines, str) else "p.jsonl")
        text = lines if isinstance(lines, str) else "\n".join(json.dumps(one) for one in lines)
        file.write_text(text, encoding="utf-8")
        return main(["generate", "--prompts-file", str(file), "-o", str(tmp_path / "out"), *QUICK, *arguments])

    return run


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of every call of the pipeline, which draws flat pictures at once instead of denoising."""
    seen: list[dict[str, Any]] = []

    def flat(self: KolorsPipeline, prompt: list[str], **arguments: Any) -> Any:
        seen.append({"prompt": prompt, **arguments})
        size = arguments["width"], arguments["height"]
        images = [Image.new("RGB", size, (len(one) % 256, 0, 0)) for one in prompt]
        return type("Output", (), {"images": images})

    monkeypatch.setattr(KolorsPipeline, "__call__", flat)
    return seen


def _names(folder: Path) -> list[str]:
    """All files, hidden ones too."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def _bytes(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in _names(folder)}


def _pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_a_line_is_the_picture_that_its_words_alone_would_be(tmp_path: Path, draw: Draw) -> None:
    """Through the real model: of several lines in a batch, each as `generate PROMPT` draws it."""
    lines = [
        {"prompt": "a red circle", "guidance_scale": 2, "seed": 3},
        {"prompt": "蓝色方块", "negative_prompt": None, "guidance_scale": 7.5},
        {"prompt": "a green square", "guidance_scale": 1.0, "steps": 2, "height": 128, "output": "sub/own.png"},
    ]
    assert draw(lines) == 0
    assert _names(tmp_path / "out") == ["000001-3.png", "000002-0.png", "sub/own.png"]
    for name, line in zip(_names(tmp_path / "out"), lines, strict=True):
        own = ["--guidance-scale", str(line["guidance_scale"]), "--seed", str(line.get("seed", 0))]
        own += ["--steps", str(line.get("steps", 1)), "--height", str(line.get("height", 64))]
        main(["generate", str(line["prompt"]), "-o", str(tmp_path / "alone.png"), *QUICK, *own])
        alone, ours = _pixels(tmp_path / "alone.png"), _pixels(tmp_path / "out" / name)
        assert np.abs(alone - ours).max() <= 1  # batches of another size may round differently
        assert alone.std() > 5


def test_text_lines_are_prompts(tmp_path: Path, draw: Draw, calls: list[Any], capsys: Any) -> None:
    assert (
        draw("\ufeffa red circle\r\n\n# no prompt\n  蓝色方块 \n", "--seed", "4", "-5", "--negative-prompt", "grey")
        == 0
    )
    expected = ["000001--5.png", "000001-4.png", "000004--5.png", "000004-4.png"]
    assert _names(tmp_path / "out") == expected
    assert sorted(capsys.readouterr().out.split()) == [str(tmp_path / "out" / name) for name in expected]
    assert [call["prompt"] for call in calls] == [["a red circle"] * 2 + ["蓝色方块"] * 2]
    assert calls[0]["negative_prompt"] == ["grey"] * 4
    assert [one.initial_seed() & (2**64 - 1) for one in calls[0]["generator"]] == [4, 2**64 - 5] * 2


def test_stdin_is_drawn_as_it_comes(tmp_path: Path, calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    class Slow(io.BytesIO):
        def __next__(self) -> bytes:
            drawn.append(len(calls))
            return super().__next__()

    monkeypatch.setattr(sys, "stdin", type("Stdin", (), {"buffer": Slow(b"a\nb\nc\n")}))
    given = ["generate", "--prompts-file", "-", "-o", str(tmp_path / "out"), "--batch", "1", *QUICK]
    assert main(given) == 0
    assert drawn == [0, 1, 2, 3]
    assert len(_names(tmp_path / "out")) == 3


BAD: list[tuple[Any, str]] = [
    ({"prompt": "x", "sead": 1}, "unknown key 'sead': did you mean 'seed'?"),
    ({"prompt": "x", "colour": 1}, "unknown key 'colour': the known ones are prompt, negative_prompt, "),
    ({}, "prompt: expected a text, got none"),
    ({"prompt": " "}, "prompt: expected a text that is not empty, got ' '"),
    ({"prompt": 7}, "prompt: expected a text that is not empty, got 7"),
    ({"prompt": "\ud800"}, r"prompt: expected a text that is not empty, got '\ud800'"),
    ({"prompt": "x", "negative_prompt": 1}, "negative_prompt: expected a text, got 1"),
    ({"prompt": "x", "seed": 1.5}, "seed: expected a whole number of 64 bits, got 1.5"),
    ({"prompt": "x", "seed": 2**64}, f"seed: expected a whole number of 64 bits, got {2**64}"),
    ({"prompt": "x", "guidance_scale": "5"}, "guidance_scale: expected a finite number, got '5'"),
    ({"prompt": "x", "guidance_scale": float("inf")}, "guidance_scale: expected a finite number, got inf"),
    ({"prompt": "x", "steps": 0}, "steps: expected a whole number from 1, got 0"),
    ({"prompt": "x", "steps": 1200}, "num_inference_steps: expected 1 to num_train_timesteps=1100, got 1200"),
    ({"prompt": "x", "height": 100}, "height: expected a positive multiple of 8, got 100"),
    ({"prompt": "x", "output": "x.jpg"}, "output: expected a name that ends in .png, got 'x.jpg'"),
    ({"prompt": "x", "output": "../x.png"}, "output: expected a name inside "),
    ({"prompt": "x", "output": "/x.png"}, "output: expected a name inside "),
    ({"prompt": "x", "output": "away/x.png"}, "output: expected a name inside "),
    ({"prompt": "x", "output": "x" * 240 + ".png"}, "output: expected names of at most 240 bytes, got 'xxx"),
    ({"prompt": "x", "output": "./same.png"}, "output: expected a name of its own, got 'same.png', which line 1 has"),
    ({"prompt": "x", "output": "same.png/x.png"}, "cannot write "),
    ([1], "expected a JSON object, got '[1]'"),
]


def test_bad_lines_are_told_and_the_rest_goes_on(tmp_path: Path, draw: Draw, capsys: Any) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "away").symlink_to(tmp_path)
    lines = [{"prompt": "a", "output": "same.png"}, *(line for line, _ in BAD), {"prompt": "b", "output": "last.png"}]
    assert draw(lines) == 1
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["away", "last.png", "same.png"]
    told = capsys.readouterr().err.splitlines()
    for number, (_, reason) in enumerate(BAD, start=2):
        assert [one for one in told if one.startswith(f"kolors-fast: {tmp_path}/p.jsonl:{number}: {reason}")], reason
    assert told[-1] == f"kolors-fast: 2 drawn, 0 there before, {len(BAD)} of {len(BAD) + 2} failed"
    assert len(told) == len(BAD) + 1


def test_lines_that_are_no_json_or_no_text(tmp_path: Path, draw: Draw, calls: list[Any], capsys: Any) -> None:
    (tmp_path / "p.jsonl").write_bytes(b'{"prompt": \n\xff\n{"prompt": "a"}')
    assert main(["generate", "--prompts-file", str(tmp_path / "p.jsonl"), "-o", str(tmp_path / "out"), *QUICK]) == 1
    told = capsys.readouterr().err
    assert "p.jsonl:1: expected a JSON object, got '{\"prompt\":' (Expecting value" in told
    assert "p.jsonl:2: expected UTF-8, got the byte 0xff at column 1" in told
    assert _names(tmp_path / "out") == ["000003-0.png"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--steps", "0"], "steps: expected a whole number from 1, got 0"),
        (["--height", "100"], "height: expected a positive multiple of 8, got 100"),
        (["--batch", "0"], "--batch: expected at least 1, got 0"),
        (["--prompts-file", "/no/such/file"], "--prompts-file: expected a file, got '/no/such/file'"),
        (["-o", "/no/such/folder/out"], "--output: expected a folder, or a new one in an existing one"),
        (["-o", __file__], "--output: expected a folder, or a new one in an existing one"),
    ],
)
def test_what_no_line_is_to_blame_for(draw: Draw, capsys: Any, arguments: list[str], sentence: str) -> None:
    assert draw("a\nb\n", *arguments) == 1
    assert capsys.readouterr().err.startswith(f"kolors-fast: {sentence}")


@pytest.mark.parametrize("arguments", [["a prompt"], ["--grid"], ["--compare-reference"]])
def test_options_of_single_prompts_do_not_go_with_a_file(arguments: list[str], draw: Draw, capsys: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        draw("a\n", *arguments)
    assert "--prompts-file: expected -o FOLDER, and no prompt" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["generate", "--batch", "2", "a prompt"])


def test_batches_are_of_one_size_and_number_of_steps(draw: Draw, calls: list[Any], capsys: Any) -> None:
    lines: list[dict[str, Any]] = [{"prompt": f"{i}", "guidance_scale": 2 + i % 3} for i in range(5)]
    lines[1]["height"] = 128
    lines[2]["steps"] = 3
    lines += [{"prompt": "unguided", "guidance_scale": 1}, {"prompt": "negative", "negative_prompt": "grey"}]
    assert draw(lines, "--batch", "2") == 0
    assert [call["prompt"] for call in calls] == [["0", "3"], ["1"], ["2"], ["4"], ["unguided"], ["negative"]]
    assert calls[0]["guidance_scale"] == [2.0, 2.0]
    assert [call["num_inference_steps"] for call in calls] == [1, 1, 3, 1, 1, 1]


def test_a_line_unlike_the_others_waits_for_a_bounded_number(tmp_path: Path) -> None:
    defaults = Defaults(None, [0], 5.0, 64, 64, 1)
    read: list[int] = []

    def lines() -> Iterator[bytes]:
        for number in range(1, 100):
            read.append(number)
            yield json.dumps({"prompt": f"{number}", "height": 64 + 8 * (number % 50)}).encode()

    requests = read_requests(lines(), tmp_path, defaults, 8, as_json=True)
    batches = grouped((one for one in requests if isinstance(one, Request)), 2)
    assert [one.line for one in next(batches)] == [1]
    assert len(read) == 8
    assert [one.line for one in next(batches)] == [2]
    assert len(read) == 9
    assert [one.line for batch in batches for one in batch] == list(range(3, 100))


LINES = [{"prompt": f"prompt {i}", "seed": i} for i in range(7)]


def test_a_rerun_draws_what_is_missing(tmp_path: Path, draw: Draw, calls: list[Any], capsys: Any) -> None:
    assert draw(LINES) == 0
    before = _bytes(tmp_path / "out")
    (tmp_path / "out" / "000003-2.png").unlink()
    calls.clear()
    capsys.readouterr()
    assert draw(LINES) == 0
    assert [call["prompt"] for call in calls] == [["prompt 2"]]
    assert _bytes(tmp_path / "out") == before
    printed = capsys.readouterr()
    assert printed.out.split() == [str(tmp_path / "out" / "000003-2.png")]
    assert "1 drawn, 6 there before, 0 of 7 failed" in printed.err


@pytest.mark.parametrize(
    ("change", "arguments", "told"),
    [
        ({"prompt": "other"}, [], "prompt 'prompt 2' and not 'other'"),
        ({"negative_prompt": "grey"}, [], "negative_prompt None and not 'grey'"),
        ({"guidance_scale": 3}, [], "guidance_scale 5.0 and not 3.0"),
        ({"height": 128, "steps": 2}, [], "height 64 and not 128, steps 1 and not 2"),
        ({"seed": 9, "output": "000003-2.png"}, [], "seed 2 and not 9"),
        ({}, ["--dtype", "bfloat16"], "dtype 'float32' and not 'bfloat16'"),
    ],
)
def test_a_picture_of_other_parameters_is_not_taken_for_this_one(
    tmp_path: Path, draw: Draw, calls: list[Any], capsys: Any, change: Any, arguments: list[str], told: str
) -> None:
    assert draw([{}, {}, LINES[2]]) == 1
    before = _bytes(tmp_path / "out")
    capsys.readouterr()
    lines = [{}, {}, {**LINES[2], **change}]
    assert draw(lines, *arguments) == 1
    path = tmp_path / "out" / "000003-2.png"
    assert f"p.jsonl:3: {path} was drawn with {told}; --overwrite draws it again" in capsys.readouterr().err
    assert _bytes(tmp_path / "out") == before
    calls.clear()
    draw(lines, *arguments, "--overwrite")
    draw(lines, *arguments, "--overwrite")  # what is there as asked for is kept all the same
    assert len(calls) == 1
    assert _bytes(tmp_path / "out") != before


def test_the_model_is_a_parameter(tmp_path: Path, draw: Draw, calls: list[Any], capsys: Any) -> None:
    from kolors_fast.assets import bundled

    assert draw(LINES[:1]) == 0
    assert draw(LINES[:1], "--model", str(bundled("kolors-tiny"))) == 1
    assert "was drawn with model 'kolors-tiny' and not '/" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["cut", "empty", "foreign", "text"])
def test_a_broken_file_is_never_taken_for_a_picture(
    tmp_path: Path, draw: Draw, calls: list[Any], capsys: Any, damage: str
) -> None:
    assert draw(LINES[:2]) == 0
    path = tmp_path / "out" / "000002-1.png"
    whole = path.read_bytes()
    if damage == "foreign":
        Image.new("RGB", (64, 64)).save(path)
    else:
        path.write_bytes({"cut": whole[:-20], "empty": b"", "text": b"a note, not a picture"}[damage])
    broken = path.read_bytes()
    assert draw(LINES[:2]) == 1
    assert f"{path} is no whole picture drawn by this command; --overwrite draws it again" in capsys.readouterr().err
    assert path.read_bytes() == broken
    assert draw(LINES[:2], "--overwrite") == 0
    assert path.read_bytes() == whole


def test_interrupted_in_the_second_batch(
    tmp_path: Path, draw: Draw, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the real model, in the middle of decoding."""
    decode, decoded = KolorsPipeline._decode, []

    def once(self: KolorsPipeline, latents: Any) -> Any:
        decoded.append(len(latents))
        if len(decoded) == 2:
            raise KeyboardInterrupt
        return decode(self, latents)

    monkeypatch.setattr(KolorsPipeline, "_decode", once)
    assert draw(LINES[:5], "--batch", "2") == 130
    printed = capsys.readouterr()
    assert printed.err == "kolors-fast: interrupted: 2 drawn; the same command continues\n"
    assert _names(tmp_path / "out") == ["000001-0.png", "000002-1.png"]
    before = _bytes(tmp_path / "out")
    assert draw(LINES[:5], "--batch", "2") == 0
    assert decoded == [2, 2, 2, 1]
    after = _bytes(tmp_path / "out")
    assert len(after) == 5
    assert before.items() <= after.items()


def test_interrupted_while_writing(
    tmp_path: Path, draw: Draw, calls: list[Any], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM, as torchrun sends it, does what Ctrl-C does."""
    save, before = Image.Image.save, signal.getsignal(signal.SIGTERM)

    def half(self: Any, file: Any, *args: Any, **options: Any) -> None:
        if len(_names(tmp_path / "out")) == 3:  # the one being written among them
            file.write(b"half")
            os.kill(os.getpid(), signal.SIGTERM)
        save(self, file, *args, **options)

    monkeypatch.setattr(Image.Image, "save", half)
    assert draw(LINES[:3]) == 130
    assert capsys.readouterr().err == "kolors-fast: interrupted: 2 drawn; the same command continues\n"
    assert _names(tmp_path / "out") == ["000001-0.png", "000002-1.png"]
    assert signal.getsignal(signal.SIGTERM) == before


def test_full_disk(tmp_path: Path, draw: Draw, calls: list[Any], capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    save = Image.Image.save

    def full(self: Any, file: Any, *args: Any, **options: Any) -> None:
        if len(_names(tmp_path / "out")) == 3:
            file.write(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(self, file, *args, **options)

    monkeypatch.setattr(Image.Image, "save", full)
    assert draw(LINES, "--batch", "2") == 1
    path = tmp_path / "out" / "000003-2.png"
    expected = f"cannot write {path}: No space left on device; 2 drawn; the same command continues"
    assert capsys.readouterr().err == f"kolors-fast: {expected}\n"
    assert _names(tmp_path / "out") == ["000001-0.png", "000002-1.png"]
    monkeypatch.setattr(Image.Image, "save", save)
    assert draw(LINES, "--batch", "2") == 0
    assert len(_names(tmp_path / "out")) == 7


def _failing(monkeypatch: pytest.MonkeyPatch, fails: Callable[[list[str], int], Exception | None]) -> None:
    """Fail the patched pipeline's call for some prompts and heights."""
    call: Any = KolorsPipeline.__call__

    def failing(self: KolorsPipeline, prompt: list[str], **arguments: Any) -> Any:
        output = call(self, prompt, **arguments)
        if error := fails(prompt, arguments["height"]):
            raise error
        return output

    monkeypatch.setattr(KolorsPipeline, "__call__", failing)


def test_out_of_memory_halves_the_batch(
    tmp_path: Path, draw: Draw, calls: list[Any], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(prompts: list[str], height: int) -> Exception | None:
        full = len(prompts) > 2 and height == 64
        return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.") if full else None

    _failing(monkeypatch, fails)
    lines = [{"prompt": f"{i}"} for i in range(10)] + [{"prompt": f"tall {i}", "height": 128} for i in range(5)]
    assert draw(lines, "--batch", "5") == 0
    assert [len(call["prompt"]) for call in calls] == [5, 2, 2, 1, 2, 2, 1, 5]
    assert len(_names(tmp_path / "out")) == 15
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "kolors-fast: warning: out of memory with 5 pictures of 64x64 at once; going on with 2"
    assert len(told) == 2


def test_no_memory_for_one_picture(draw: Draw, calls: list[Any], capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _failing(monkeypatch, lambda _, height: torch.OutOfMemoryError("CUDA out of memory.") if height == 128 else None)
    assert draw([{"prompt": "tall", "height": 128}, {"prompt": "a"}]) == 1
    assert "p.jsonl:1: CUDA out of memory.\n" in capsys.readouterr().err


def test_a_prompt_that_fails_takes_no_other_with_it(
    tmp_path: Path, draw: Draw, calls: list[Any], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _failing(monkeypatch, lambda prompts, _: RuntimeError("the latents hold NaN") if "prompt 3" in prompts else None)
    assert draw(LINES, "--batch", "7") == 1
    assert "p.jsonl:4: the latents hold NaN\n" in capsys.readouterr().err
    assert len(_names(tmp_path / "out")) == 6


def test_a_lost_device_ends_the_run(draw: Draw, calls: list[Any], capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = getattr(torch, "AcceleratorError", None)
    if lost is None:
        pytest.skip("this torch does not tell a lost device from other errors")
    _failing(monkeypatch, lambda *_: lost("CUDA error: an illegal memory access"))
    assert draw(LINES) == 1
    assert len(calls) == 1
    assert "CUDA error: an illegal memory access" in capsys.readouterr().err


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_workers_shares_are_disjoint_complete_and_balanced(count: int) -> None:
    shares = [list(Worker(rank, count).share(range(23))) for rank in range(count)]
    assert sorted(one for share in shares for one in share) == list(range(23))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def _as_worker(monkeypatch: pytest.MonkeyPatch, rank: int, count: int) -> None:
    for name, value in (("RANK", rank), ("WORLD_SIZE", count), ("LOCAL_RANK", rank)):
        monkeypatch.setenv(name, str(value))


def test_a_dead_workers_share_is_drawn_by_any_number_of_others(
    tmp_path: Path, draw: Draw, calls: list[Any], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [*LINES, {"prompt": ""}]
    _as_worker(monkeypatch, 1, 3)  # 0 and 2 died before they drew
    assert draw(lines) == 1
    assert _names(tmp_path / "out") == ["000002-1.png", "000005-4.png"]  # and number 8 is bad
    statuses = []
    for rank in range(2):
        _as_worker(monkeypatch, rank, 2)
        statuses.append(draw(lines))
    assert len(_names(tmp_path / "out")) == 7
    prompts = Counter(prompt for call in calls for prompt in call["prompt"])
    assert prompts == Counter(f"prompt {i}" for i in range(7))  # each once
    assert sorted(statuses) == [0, 1]  # one worker tells of the bad line
    assert capsys.readouterr().err.count("p.jsonl:8: prompt: expected a text") == 2


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK: expected less than WORLD_SIZE=2, got 2"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: expected a whole number in the environment, got 'two'"),
    ],
)
def test_a_bad_environment(
    draw: Draw, capsys: Any, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], sentence: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert draw("a\n") == 1
    assert capsys.readouterr().err == f"kolors-fast: {sentence}\n"


def test_several_workers_cannot_share_stdin(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _as_worker(monkeypatch, 0, 2)
    assert main(["generate", "--prompts-file", "-", "-o", str(tmp_path / "out"), *QUICK]) == 1
    assert "--prompts-file: expected a file, for several workers would share stdin" in capsys.readouterr().err


def test_each_worker_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert Worker(5, 8, 1).device(None) == "cuda:1"
    assert Worker(4, 8, 0).device("cuda") == "cuda:0"
    assert chosen == [1, 0]
    assert Worker(5, 8, 1).device("cpu") == "cpu"
    assert Worker().device(None) is None
    with pytest.raises(ValueError, match="LOCAL_RANK: expected one worker a GPU, of which there are 2, got 2"):
        Worker(2, 8, 2).device(None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Worker(5, 8, 1).device(None) is None


def test_a_failed_worker_waits_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    agents = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port)}
    for name, value in agents.items():
        monkeypatch.setenv(name, value)
    failed = threading.Thread(target=Worker(0, 2).finish, kwargs={"failed": True})
    failed.start()
    failed.join(0.3)
    assert failed.is_alive()
    Worker(1, 2).finish(failed=False)
    failed.join(10)
    assert not failed.is_alive()


def test_two_processes_under_torchrun(tmp_path: Path) -> None:
    """One fails early, for its line is bad; torchrun would kill the other if it did not wait."""
    (tmp_path / "p.jsonl").write_text("".join(f'not json\n{{"prompt": "{i}", "steps": 40}}\n' for i in range(3)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "kolors_fast.cli", "generate", "--prompts-file", str(tmp_path / "p.jsonl")]
    ran = subprocess.run(
        [*command, "-o", str(tmp_path / "out"), "--batch", "1", *QUICK], capture_output=True, text=True
    )
    assert ran.returncode == 1, ran.stderr
    assert _names(tmp_path / "out") == ["000002-0.png", "000004-0.png", "000006-0.png"], ran.stderr
    assert "3 drawn, 0 there before, 0 of 3 failed" in ran.stderr
    assert "3 of 3 failed" in ran.stderr
