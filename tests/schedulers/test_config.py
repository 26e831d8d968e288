"""scheduler_config.json: read, written, and carried between classes as diffusers does."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import pytest

import kolors_fast.schedulers as ours

SHIPPED = {  # the file that Kolors ships
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.18.0.dev0",
    "beta_end": 0.014,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "dynamic_thresholding_ratio": 0.995,
    "interpolation_type": "linear",
    "num_train_timesteps": 1100,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "thresholding": False,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}
NAMES = [
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
]


def ship(folder: Path) -> Path:
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SHIPPED))
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_the_shipped_file_gives_the_config_that_diffusers_reads(name: str, tmp_path: Path) -> None:
    theirs, mine = (
        getattr(library, name).from_pretrained(str(ship(tmp_path / str(i))), subfolder="scheduler")
        for i, library in enumerate((diffusers, ours))
        if not (tmp_path / str(i)).mkdir()
    )
    hidden = ("_use_default_values", "_class_name", "_diffusers_version")
    assert {k: v for k, v in mine.config.items() if k not in hidden} == {
        k: v for k, v in theirs.config.items() if k not in hidden
    }


@pytest.mark.parametrize("name", NAMES)
def test_defaults_and_their_order_are_those_of_diffusers(name: str) -> None:
    theirs, mine = (getattr(library, name)() for library in (diffusers, ours))
    names = [key for key in mine.config if not key.startswith("_")]
    assert names == [key for key in theirs.config if not key.startswith("_")]
    assert {key: mine.config[key] for key in names} == {key: theirs.config[key] for key in names}


def test_switching_classes_drops_the_other_class_s_defaults_and_keeps_foreign_keys() -> None:
    config = ours.EulerDiscreteScheduler(num_train_timesteps=1100).config
    assert ours.DDIMScheduler.from_config(config).config.timestep_spacing == "leading"  # DDIM's default, not Euler's
    loaded = ours.EulerDiscreteScheduler.from_config(SHIPPED)
    assert loaded.config.clip_sample is False
    assert ours.DDIMScheduler.from_config(loaded.config).config.clip_sample is False
    solver = ours.DPMSolverMultistepScheduler.from_config(loaded.config, use_karras_sigmas=True)
    assert solver.config.use_karras_sigmas
    assert len(solver) == 1100


@pytest.mark.parametrize("name", NAMES)
def test_saved_files_are_read_by_diffusers_and_back(name: str, tmp_path: Path) -> None:
    mine = getattr(ours, name)(num_train_timesteps=1100, beta_end=0.014, beta_schedule="scaled_linear")
    mine.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["scheduler_config.json"]
    theirs = getattr(diffusers, name).from_pretrained(str(tmp_path))
    again = getattr(ours, name).from_pretrained(tmp_path)
    for key, value in mine.config.items():
        if key != "_use_default_values":
            assert theirs.config[key] == again.config[key] == value
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["_class_name"] == name


def test_diffusers_config_objects_are_accepted() -> None:
    mine = ours.DDIMScheduler.from_config(diffusers.DDIMScheduler(num_train_timesteps=1100, steps_offset=1).config)
    assert (len(mine), mine.config.steps_offset) == (1100, 1)


def test_bad_configs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="use_karras_sigma: expected one of EulerDiscreteScheduler's keys"):
        ours.EulerDiscreteScheduler.from_config(SHIPPED, use_karras_sigma=True)
    with pytest.raises(TypeError, match="use_karras_sigma"):
        ours.EulerDiscreteScheduler(use_karras_sigma=True)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="config: expected a mapping of scheduler settings, got str"):
        ours.EulerDiscreteScheduler.from_config("scheduler")  # type: ignore[arg-type]
    with pytest.raises(OSError, match=r"expected a folder holding scheduler/scheduler_config\.json"):
        ours.EulerDiscreteScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    with pytest.raises(OSError, match="expected a folder or a reachable Hub repository, got 'no such/folder/here'"):
        ours.EulerDiscreteScheduler.from_pretrained("no such/folder/here")
    (tmp_path / "scheduler_config.json").write_text("{")
    with pytest.raises(OSError, match=r"scheduler_config\.json: expected a JSON object, got unreadable text"):
        ours.EulerDiscreteScheduler.from_pretrained(tmp_path)
    with pytest.raises(AttributeError, match="config key 'steps_offset' is read-only"):
        ours.DDIMScheduler().config.steps_offset = 2
