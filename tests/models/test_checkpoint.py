"""PretrainedModel against diffusers' ModelMixin: each reads what the other writes, and bad files are refused."""

from __future__ import annotations

import fnmatch
import json
import os
import pickle
import re
import shutil
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kolors_fast.models import checkpoint
from kolors_fast.models.checkpoint import CheckpointError, Config, PretrainedModel


class Theirs(ModelMixin, ConfigMixin):
    """The same tiny model in diffusers."""

    @register_to_config
    def __init__(self, width: int = 6, name: str | None = None, sizes: tuple[int, ...] = (1, 2)) -> None:
        super().__init__()
        self.first = nn.Linear(width, 5)
        self.second = nn.Conv2d(5, 4, 3)
        self.register_buffer("count", torch.arange(3))


class Ours(PretrainedModel):
    diffusers_name = "Theirs"
    _unused_keys = ("spare",)

    def __init__(self, *, width: int = 6, name: str | None = None, sizes: tuple[int, ...] = (1, 2)) -> None:
        super().__init__()
        self.register_config(width=width, name=name, sizes=sizes)
        self.first = nn.Linear(width, 5)
        self.second = nn.Conv2d(5, 4, 3)
        self.register_buffer("count", torch.arange(3))

    def _convert_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key.replace("old_first", "first"): value for key, value in state.items()}


def assert_same(state: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert state.keys() == other.keys()
    assert all(torch.equal(state[key], other[key]) for key in state)


def names(folder: Path, number: str = r"\g<0>") -> set[str]:
    """File names, with `number` in place of the shard numbers, which depend on how one packs."""
    return {re.sub(r"-\d{5}-of-\d{5}", number, path.name) for path in folder.iterdir()}


@pytest.fixture
def model() -> Ours:
    torch.manual_seed(0)
    return Ours(width=7, name="seven")


@pytest.fixture
def folder(model: Ours, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def rewrite(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_config_is_a_dict_with_attributes(model: Ours) -> None:
    assert model.config.width == model.config["width"] == dict(**model.config)["width"] == 7
    assert model.config.get("none") is None and not hasattr(model.config, "none")
    model.config.width = 8
    model.register_config(name="eight")
    assert model.config == {"width": 8, "name": "eight", "sizes": (1, 2)}
    assert Ours.from_config(model.config).first.in_features == 8
    assert Ours.from_config(model.config, width=9).config.width == 9


def test_from_config_warns_about_unknown_values() -> None:
    with pytest.warns(UserWarning, match="Ours has no use for the config values 'height'"):
        model = Ours.from_config({"width": 7, "height": 3, "_class_name": "Theirs"})
    assert model.config == {"width": 7, "name": None, "sizes": (1, 2)}


def test_dtype_and_device(model: Ours) -> None:
    assert (model.dtype, model.device.type) == (torch.float32, "cpu")
    assert (model.half().dtype, model.to("meta").device.type) == (torch.float16, "meta")


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("shard", ["10GB", 400], ids=["single", "sharded"])
def test_loads_what_diffusers_saves(tmp_path: Path, safe: bool, variant: str | None, shard: Any) -> None:
    theirs = Theirs(width=7, sizes=(3, 4))
    theirs.save_pretrained(
        tmp_path / "unet", safe_serialization=safe, variant=variant, max_shard_size=shard, is_main_process=True
    )
    assert any("index" in name for name in names(tmp_path / "unet")) == (shard == 400)
    ours = Ours.from_pretrained(tmp_path, subfolder="unet", variant=variant)
    assert_same(ours.state_dict(), theirs.state_dict())
    assert ours.config == {
        "width": 7,
        "name": None,
        "sizes": [3, 4],
    }
    assert not ours.training and all(p.requires_grad for p in ours.parameters())


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("shard", ["10GB", "0.4 KB", 400], ids=str)
def test_diffusers_loads_what_we_save(model: Ours, tmp_path: Path, variant: str | None, shard: int | str) -> None:
    model.save_pretrained(tmp_path / "out", variant=variant, max_shard_size=shard)
    theirs = Theirs.from_pretrained(tmp_path / "out", variant=variant)
    assert_same(theirs.state_dict(), model.state_dict())
    assert (theirs.config.width, theirs.config.name) == (7, "seven")
    reference = tmp_path / "reference"
    Theirs(width=7).save_pretrained(reference, variant=variant, max_shard_size=400 if shard != "10GB" else shard)
    assert names(tmp_path / "out", number="-N") == names(reference, number="-N")


def test_older_variant_index_name(tmp_path: Path) -> None:
    theirs = Theirs()
    theirs.save_pretrained(tmp_path, variant="fp16", max_shard_size=400)
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.fp16.json"
    index.rename(tmp_path / "diffusion_pytorch_model.safetensors.fp16.index.json")
    assert_same(Ours.from_pretrained(tmp_path, variant="fp16").state_dict(), theirs.state_dict())


def test_torch_dtype(folder: Path, model: Ours) -> None:
    loaded = Ours.from_pretrained(folder, torch_dtype=torch.float16)
    assert loaded.dtype == torch.float16 and loaded.count.dtype == torch.int64
    assert torch.equal(loaded.first.weight, model.first.weight.half())
    loaded.save_pretrained(folder)
    assert load_file(folder / "diffusion_pytorch_model.safetensors")["first.weight"].dtype == torch.float16
    assert Ours.from_pretrained(folder).dtype == Theirs.from_pretrained(folder).dtype == torch.float32


def mapped(value: Tensor) -> bool:
    """Whether the tensor lies in a mapped safetensors file."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(address, 16) for address in line.split()[0].split("-"))
        if start <= value.data_ptr() < end:
            return line.endswith(".safetensors")
    raise AssertionError("no mapping holds the tensor")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_weights_stay_in_the_mapped_file_unless_cast(folder: Path) -> None:
    as_stored, cast = Ours.from_pretrained(folder), Ours.from_pretrained(folder, torch_dtype=torch.bfloat16)
    assert all(mapped(value) for value in as_stored.state_dict().values())
    assert not any(mapped(value) for value in cast.state_dict().values() if value.is_floating_point())


def test_editing_a_mapped_weight_leaves_the_file_alone(folder: Path, model: Ours) -> None:
    loaded = Ours.from_pretrained(folder)
    nn.init.ones_(loaded.first.weight)
    assert torch.equal(Ours.from_pretrained(folder).first.weight, model.first.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_one_tensor_at_a_time_goes_to_the_device(
    folder: Path, model: Ours, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Each tensor is dropped by the loader before the next is read from the file."""
    model.save_pretrained(folder, max_shard_size=400)
    source: list[weakref.ref[Tensor]] = []
    load = Ours._load_tensor

    def record(self: Ours, key: str, value: Tensor, *others: Any) -> dict[str, Tensor]:
        assert not any(ref() is not None for ref in source)
        source.append(weakref.ref(value))
        return load(self, key, value, *others)

    monkeypatch.setattr(Ours, "_load_tensor", record)
    loaded = Ours.from_pretrained(folder, device="meta", torch_dtype=dtype)
    assert len(source) == 5 and {value.device.type for value in loaded.state_dict().values()} == {"meta"}
    assert (loaded.dtype, loaded.count.dtype) == (dtype, torch.int64)


def test_weights_come_and_go(folder: Path, model: Ours) -> None:
    other = Ours.empty(model.config, torch.float16)
    assert (other.device.type, other.dtype, other.count.dtype, other.training) == (
        "meta",
        torch.float16,
        torch.int64,
        False,
    )
    for _ in range(2):
        other.load_weights(folder)
        assert torch.equal(other.second.weight, model.second.weight.half())
        other.release_weights()
        assert {value.device.type for value in other.state_dict().values()} == {"meta"} and other.dtype == torch.float16
    nn.init.ones_(model.first.weight)
    model.save_pretrained(folder)
    other.load_weights(folder)
    assert (other.first.weight == 1).all()


def test_saves_views_and_channels_last(model: Ours, tmp_path: Path) -> None:
    """Parameters may be views of one storage, and convolution weights may be stored channels last."""
    model.to(memory_format=torch.channels_last)
    storage = torch.randn(10, 7)
    model.first.weight = nn.Parameter(storage[5:])
    model.first.register_parameter("other", nn.Parameter(storage[:5]))
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert_same(saved, dict(model.state_dict()))


def test_loading_initialises_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Building on the meta device needs no memory and draws no random number."""
    state = torch.random.get_rng_state()
    Ours.from_pretrained(folder)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_unused_and_old_keys(folder: Path, model: Ours) -> None:
    state = {key.replace("first", "old_first"): value for key, value in model.state_dict().items()}
    file = folder / "diffusion_pytorch_model.safetensors"
    save_file({**state, "spare.weight": torch.ones(2)}, file)
    assert_same(Ours.from_pretrained(folder).state_dict(), dict(model.state_dict()))
    save_file({**state, "spares": torch.ones(2)}, file)
    with pytest.raises(CheckpointError, match="'spares', unknown to Ours"):
        Ours.from_pretrained(folder)


def test_a_table_outside_the_state_dict(tmp_path: Path) -> None:
    class WithTable(Ours):
        device: Any = "cpu"

        def __init__(self, **config: Any) -> None:
            super().__init__(**config)
            self.register_buffer("table", torch.arange(4, device=self.device), persistent=False)

    model = WithTable()
    model.save_pretrained(tmp_path)
    assert torch.equal(WithTable.from_pretrained(tmp_path).table, torch.arange(4))
    WithTable.device = None
    with pytest.raises(RuntimeError, match="WithTable must create 'table' with device='cpu'"):
        WithTable.from_pretrained(tmp_path)


def test_saving_again_leaves_no_stale_files(folder: Path, model: Ours) -> None:
    model.save_pretrained(folder, variant="fp16")
    model.save_pretrained(folder, max_shard_size=400)
    kept = {"config.json", "diffusion_pytorch_model.fp16.safetensors"}
    sharded = names(folder) - kept
    assert "diffusion_pytorch_model.safetensors.index.json" in sharded
    assert "diffusion_pytorch_model.safetensors" not in sharded
    nn.init.ones_(model.first.weight)
    model.save_pretrained(folder)
    assert names(folder) == kept | {"diffusion_pytorch_model.safetensors"}
    assert_same(Ours.from_pretrained(folder).state_dict(), dict(model.state_dict()))
    assert (Ours.from_pretrained(folder, variant="fp16").first.weight != 1).any()


@pytest.mark.parametrize("exists", [True, False])
def test_a_failed_save_changes_nothing(
    model: Ours, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool
) -> None:
    target = tmp_path / "model"
    if exists:
        model.save_pretrained(target)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*/*")}

    def out_of_space(tensors: dict[str, Tensor], file: Path, **_: Any) -> None:
        file.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint, "save_file", out_of_space)
    with pytest.raises(OSError, match="no space left"):
        Ours().save_pretrained(target, max_shard_size=400)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*/*")} == before
    assert names(tmp_path) == ({"model"} if exists else set())


def test_write_file_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "notes.txt"
    checkpoint.write_file(file, b"old")

    def killed(source: Path, target: Path) -> None:
        assert source.parent == tmp_path and source.read_bytes() == b"new"
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.write_file(file, b"new")
    assert names(tmp_path) == {"notes.txt"} and file.read_bytes() == b"old"


# --- refusals: one sentence each, naming the file, key or shape


def refusal(path: Path | str, **arguments: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        Ours.from_pretrained(path, **arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_refuses_unknown_folders(folder: Path) -> None:
    assert f"no model folder '{folder}/nope' exists" in refusal(folder / "nope")
    assert "no model folder './owner/name' exists" in refusal("./owner/name")
    assert "has no subfolder 'unet'" in refusal(folder, subfolder="unet")


def test_refuses_missing_files(folder: Path) -> None:
    assert "expected diffusion_pytorch_model.fp16.safetensors" in refusal(folder, variant="fp16")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    assert "has no weights: expected diffusion_pytorch_model.safetensors" in refusal(folder)
    (folder / "config.json").unlink()
    assert "config.json is missing" in refusal(folder)


def test_refuses_broken_shards(folder: Path, model: Ours) -> None:
    model.save_pretrained(folder, max_shard_size=400)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    shard = sorted(folder.glob("*-00001-of-*"))[0]
    shard.unlink()
    assert f"the shard {shard} is missing" in refusal(folder)
    rewrite(index, weight_map={"first.weight": "../model/config.json"})
    assert "lies outside its folder" in refusal(folder)
    rewrite(index, weight_map=["first.weight"])
    assert "has no 'weight_map'" in refusal(folder)
    index.write_text("{")
    assert f"{index} is not valid JSON" in refusal(folder)


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, -1])
def test_refuses_truncated_weights(folder: Path, model: Ours, keep: float) -> None:
    file = folder / "diffusion_pytorch_model.safetensors"
    binary = folder / "diffusion_pytorch_model.bin"
    torch.save(dict(model.state_dict()), binary)
    for path in (file, binary):
        content = path.read_bytes()
        path.write_bytes(content[: int(keep * len(content)) if keep == 0.5 else int(keep)])
        assert f"{path} is truncated" in refusal(folder)
        path.unlink()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_refuses_pickled_objects(folder: Path, model: Ours) -> None:
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    file = folder / "diffusion_pytorch_model.bin"
    hit = folder / "executed"

    class Harmful:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(hit),)

    torch.save({**model.state_dict(), "harm": Harmful()}, file)
    assert f"{file} is truncated or not a file of plain tensors" in refusal(folder)
    file.write_bytes(pickle.dumps(Harmful()))
    assert f"{file} is truncated or not a file of plain tensors" in refusal(folder)
    torch.save([torch.ones(2)], file)
    assert f"{file} must hold a dict of tensors" in refusal(folder)
    assert not hit.exists()


def test_loads_the_oldest_bin_format(folder: Path, model: Ours) -> None:
    """Files from before torch 1.6 are no zip archives and cannot be mapped."""
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    file = folder / "diffusion_pytorch_model.bin"
    torch.save(model.state_dict(), file, _use_new_zipfile_serialization=False)
    assert_same(Ours.from_pretrained(folder).state_dict(), dict(model.state_dict()))


def test_refuses_wrong_keys_and_shapes(folder: Path, model: Ours) -> None:
    file = folder / "diffusion_pytorch_model.safetensors"
    state = dict(model.state_dict())
    save_file({"first.weight": state["first.weight"]}, file)
    assert "lack 'count', 'first.bias', 'second.weight' and 1 more, which Ours needs" in refusal(folder)
    save_file({**state, "third.bias": torch.ones(1)}, file)
    assert "hold 'third.bias', unknown to Ours" in refusal(folder)
    save_file({**state, "first.weight": torch.ones(7, 5)}, file)
    assert "first.weight (expected (5, 7), got (7, 5))" in refusal(folder)


def test_refuses_other_configs(folder: Path) -> None:
    config = folder / "config.json"
    rewrite(config, _class_name="AutoencoderKL")
    message = refusal(folder)
    assert f"{config} describes a AutoencoderKL" in message and "config of a Theirs" in message
    rewrite(config, _class_name=None, architectures=["T5EncoderModel"])
    assert "describes a T5EncoderModel" in refusal(folder)
    rewrite(config, architectures=["Ours"])
    assert isinstance(Ours.load_config(folder), Config)
    config.write_text("[1]")
    assert "must hold a JSON object, got a list" in refusal(folder)
    config.write_bytes(b"\xff{}")
    assert f"{config} is not valid JSON" in refusal(folder)


def test_refuses_bad_save_arguments(model: Ours, folder: Path) -> None:
    with pytest.raises(ValueError, match="max_shard_size must be bytes or text such as '5GB', got 'big'"):
        model.save_pretrained(folder, max_shard_size="big")
    with pytest.raises(CheckpointError, match="it is a file, not a folder"):
        model.save_pretrained(folder / "config.json")


# --- hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the hub: "owner/name" downloads the matching files of a folder."""
    source, cache = tmp_path / "hub", tmp_path / "cache"
    cache.mkdir()

    def download(repo: str, *, allow_patterns: list[str]) -> str:
        if repo != "owner/name":
            raise ConnectionError("several\nlines")
        for file in source.rglob("*.*"):
            relative = file.relative_to(source)
            if any(fnmatch.fnmatch(str(relative), pattern) for pattern in allow_patterns):
                (cache / relative).parent.mkdir(exist_ok=True)
                shutil.copy(file, cache / relative)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return source


@pytest.mark.parametrize("safe", [True, False])
def test_hub_fetches_only_what_is_needed(hub: Path, model: Ours, safe: bool) -> None:
    theirs = Theirs(width=7)
    theirs.save_pretrained(hub / "vae", variant="fp16")
    theirs.save_pretrained(hub / "unet")
    theirs.save_pretrained(hub / "unet", safe_serialization=False)
    others = names(hub / "unet")
    theirs.save_pretrained(hub / "unet", variant="fp16", max_shard_size=400, safe_serialization=safe)
    wanted = names(hub / "unet") - others | {"config.json"}
    assert len(wanted) > 3
    loaded = Ours.from_pretrained("owner/name", subfolder="unet", variant="fp16")
    assert_same(loaded.state_dict(), theirs.state_dict())
    assert names(hub.parent / "cache") == {"unet"} and names(hub.parent / "cache" / "unet") == wanted


def test_hub_out_of_reach(hub: Path) -> None:
    message = refusal("other/name")
    assert message == (
        "'other/name' is no folder here and could not be fetched from the Hugging Face Hub (ConnectionError)"
    )
