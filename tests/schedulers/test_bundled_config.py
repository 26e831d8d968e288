"""The bundled scheduler config, as released ones do, keeps DDIM and DDPM from clipping latents."""

import pytest

from kolors_fast import schedulers
from kolors_fast.assets import bundled


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler"])
def test_latents_are_not_clipped(name):
    euler = schedulers.EulerDiscreteScheduler.from_pretrained(bundled("kolors-tiny"), subfolder="scheduler")
    made = getattr(schedulers, name).from_config(euler.config)
    assert made.config.clip_sample is False  # the class's own default clips at 1; latents reach 6
    assert made.config.num_train_timesteps == 1100
