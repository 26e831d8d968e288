"""Flow-matching Euler against diffusers': sigmas to the bit, steps in float32, and inside diffusers' pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kolors_fast.schedulers as ours
from kolors_fast.sampling.denoise import denoise
from kolors_fast.sampling.graphs import StepGraphs

NAME = "FlowMatchEulerDiscreteScheduler"
SD3 = {"shift": 3.0}
SHAPE = (2, 4, 5, 3)
LINEAR = [1.0, 0.8, 0.55, 0.3, 0.1]
RUNS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    *[({"shift": shift}, {"num_inference_steps": n}) for shift in (1.0, 3.0) for n in (1, 4, 28, 50)],
    ({"use_dynamic_shifting": True}, {"num_inference_steps": 28, "mu": 0.9}),
    ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, {"num_inference_steps": 28, "mu": 2.5}),
    ({"use_dynamic_shifting": True}, {"sigmas": LINEAR, "mu": 1.15}),
    (SD3, {"sigmas": LINEAR}),
    (SD3, {"sigmas": [1.0, 0.6, 0.0]}),
    (SD3, {"sigmas": LINEAR, "num_inference_steps": 5, "mu": 0.7}),  # mu unused, as FLUX.1-schnell passes it
    (SD3, {"timesteps": [1000.0, 700.0, 333.3, 20.0]}),
    (SD3, {"timesteps": [999.0, 800.0, 400.0, 100.0, 50.0], "sigmas": LINEAR}),
    ({**SD3, "shift_terminal": 0.1}, {"num_inference_steps": 8}),
    ({"use_dynamic_shifting": True, "shift_terminal": 0.02}, {"num_inference_steps": 8, "mu": 1.0}),
    ({**SD3, "use_karras_sigmas": True}, {"num_inference_steps": 8}),
    ({**SD3, "use_exponential_sigmas": True}, {"num_inference_steps": 8}),
    ({**SD3, "invert_sigmas": True}, {"num_inference_steps": 8}),
    ({"invert_sigmas": True}, {"sigmas": LINEAR}),
    ({**SD3, "num_train_timesteps": 50}, {"num_inference_steps": 8}),
    ({**SD3, "stochastic_sampling": True}, {"num_inference_steps": 8}),
]


def both(config: dict[str, Any], run: dict[str, Any]) -> tuple[Any, Any]:
    made = [getattr(library, NAME)(**config) for library in (diffusers, ours)]
    for scheduler in made:
        scheduler.set_timesteps(**run)
    return made[0], made[1]


def velocity(sample: Tensor, timestep: Tensor | float) -> Tensor:
    """A model that half sees a fixed picture; what one step gets wrong is still seen at the next ones."""
    picture = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3)).to(sample.dtype)
    return sample - picture + torch.tanh(sample) * (0.3 + float(timestep) / 2000)


def start() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def trajectory(scheduler: Any, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator, samples = torch.Generator().manual_seed(1), [start().to(dtype)]
    for t in scheduler.timesteps:
        samples.append(scheduler.step(velocity(samples[-1], t), t, samples[-1], generator=generator)[0])
    return samples[1:]


@pytest.mark.parametrize(("config", "run"), RUNS, ids=str)
def test_sigmas_timesteps_and_trajectories_are_those_of_diffusers(config: dict[str, Any], run: dict[str, Any]) -> None:
    theirs, mine = both(config, run)
    torch.testing.assert_close(mine.sigmas, theirs.sigmas, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(mine.timesteps, theirs.timesteps, rtol=1e-6, atol=1e-4)
    assert mine.num_inference_steps == theirs.num_inference_steps == len(mine.timesteps)
    expected, got = trajectory(theirs), trajectory(mine)
    for a, b in zip(got, expected, strict=True):
        assert (a - b).abs().max() <= 1e-6 * max(1.0, float(b.abs().max()))
    assert mine.step_index == theirs.step_index
    table = mine.step_table()
    looped = denoise(
        lambda inputs, row: velocity(inputs, table.timesteps[row]),
        table,
        start() * table.initial_scale,
        torch.ones(1),
        generator=torch.Generator().manual_seed(1),
    )
    torch.testing.assert_close(looped, expected[-1], rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 4, 28, 50])
def test_numbered_runs_are_diffusers_to_the_bit(shift: float, steps: int) -> None:
    """Then a trained model is told the very same timesteps."""
    theirs, mine = both({"shift": shift}, {"num_inference_steps": steps})
    assert torch.equal(mine.sigmas, theirs.sigmas)
    assert torch.equal(mine.timesteps, theirs.timesteps)


def test_runs_of_stable_diffusion_3() -> None:
    """Worked out by hand from the shift of 3, twice at the low end: once it makes 1/1000 of 0.002994, then 0.008929."""
    mine = both(SD3, {"num_inference_steps": 4})[1]
    assert mine.sigmas.tolist() == pytest.approx([1, 0.857692, 0.602151, 0.0089286, 0], abs=1e-6)
    mine.set_timesteps(28)
    assert mine.sigmas[:4].tolist() == pytest.approx([1, 0.98738, 0.97411, 0.96013], abs=5e-6)
    assert mine.sigmas[-5:].tolist() == pytest.approx([0.27805, 0.19983, 0.11091, 0.0089286, 0], abs=5e-6)
    assert mine.sigma_min == pytest.approx(0.003 / 1.002, rel=1e-6)
    assert mine.timesteps[0] == 1000


@pytest.mark.parametrize("config", [{}, SD3, {"use_dynamic_shifting": True}], ids=str)
def test_before_set_timesteps_the_run_is_the_training_schedule(config: dict[str, Any]) -> None:
    theirs, mine = (getattr(library, NAME)(**config) for library in (diffusers, ours))
    assert torch.equal(mine.timesteps, theirs.timesteps)
    assert torch.equal(mine.sigmas[:-1], theirs.sigmas)
    assert (mine.sigma_min, mine.sigma_max, mine.shift) == (theirs.sigma_min, theirs.sigma_max, theirs.shift)
    assert len(mine) == len(theirs) == len(mine.step_table()) == 1000


def test_another_shift_leaves_the_lowest_sigma() -> None:
    made = [getattr(library, NAME)(**SD3) for library in (diffusers, ours)]
    for scheduler in made:
        scheduler.set_shift(5.0)
        scheduler.set_timesteps(10)
    assert made[1].shift == 5.0
    assert torch.equal(made[1].sigmas, made[0].sigmas)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_time_shift(kind: str) -> None:
    theirs, mine = (getattr(library, NAME)(time_shift_type=kind) for library in (diffusers, ours))
    for t in (torch.linspace(0.01, 1, 50, dtype=torch.float64), np.linspace(0.01, 1, 50)):
        for mu, sigma in ((0.5, 1.0), (1.15, 2.0)):
            np.testing.assert_allclose(mine.time_shift(mu, sigma, t), theirs.time_shift(mu, sigma, t), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", [SD3, {**SD3, "stochastic_sampling": True}], ids=str)
def test_half_precision_steps_round_once(dtype: torch.dtype, config: dict[str, Any]) -> None:
    """Against the step in float32, from diffusers' samples: the same but for the rounding of what is stored."""
    theirs, mine = both(config, {"num_inference_steps": 10})
    draws = [torch.Generator().manual_seed(1) for _ in range(2)]
    sample = start().to(dtype)
    for t in mine.timesteps:
        output = velocity(sample, t)
        expected = theirs.step(output.float(), t, sample.float(), generator=draws[0]).prev_sample
        got = mine.step(output, t, sample, generator=draws[1]).prev_sample
        assert got.dtype == dtype
        limit = expected.abs() * torch.finfo(dtype).eps / 2 + 1e-6
        if config.get("stochastic_sampling"):
            limit = limit + torch.finfo(dtype).eps * 2  # the noise, of up to 4, is rounded before it is added
        assert ((got.float() - expected).abs() <= limit).all()
        sample = expected.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_scale_noise(dtype: torch.dtype) -> None:
    clean, noise = torch.randn(2, 3, 4, 5, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    theirs, mine = both(SD3, {"num_inference_steps": 20})
    at = mine.timesteps[[0, 7, 19]]
    expected = theirs.scale_noise(clean.double(), at, noise.double())
    got = mine.scale_noise(clean, at, noise)
    assert got.dtype == dtype
    limit = torch.finfo(dtype).eps if dtype != torch.float32 else 1e-6
    torch.testing.assert_close(got.double(), expected, rtol=limit, atol=limit)
    for scheduler in (theirs, mine):
        scheduler.set_begin_index(5)  # image-to-image: the noise is that of the begin, whatever the timesteps
    expected = theirs.scale_noise(clean.double(), at, noise.double())
    torch.testing.assert_close(mine.scale_noise(clean, at, noise).double(), expected, rtol=limit, atol=limit)


def test_starting_in_the_middle() -> None:
    """Image-to-image: noise at the begin index, then the rest, step by step and through the loop."""
    results = []
    for scheduler in both(SD3, {"num_inference_steps": 10}):
        scheduler.set_begin_index(6)
        left = scheduler.timesteps[6:]
        noisy = sample = scheduler.scale_noise(velocity(start(), 0.0), left[:1].repeat(2), start())
        for t in left:
            sample = scheduler.step(velocity(sample, t), t, sample, return_dict=False)[0]
        results.append(sample)
    table = scheduler.step_table(begin=6)
    results.append(
        denoise(lambda inputs, row: velocity(inputs, table.timesteps[row]), table, noisy, torch.ones(1), start=6)
    )
    for got in results[1:]:
        torch.testing.assert_close(got, results[0], rtol=1e-6, atol=1e-6)


def test_of_equal_timesteps_the_second_is_meant() -> None:
    theirs, mine = both({"shift": 1e9}, {"num_inference_steps": 5})
    assert len(set(mine.timesteps.tolist())) < 5
    for t in mine.timesteps:
        assert mine.index_for_timestep(t) == theirs.index_for_timestep(t)
    assert mine.index_for_timestep(mine.timesteps[0]) == 1


def test_the_denoised_is_the_end_of_the_straight_path() -> None:
    clean, noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(5))
    for inverted in (False, True):
        mine = both({**SD3, "invert_sigmas": inverted}, {"num_inference_steps": 8})[1]
        t, sigma = mine.timesteps[3], float(mine.sigmas[3])
        share = 1 - sigma if inverted else sigma
        sample = (1 - share) * clean + share * noise
        output = (clean - noise) if inverted else (noise - clean)
        got = mine.step(output, t, sample)
        torch.testing.assert_close(got.pred_original_sample, clean, rtol=1e-5, atol=1e-6)


def test_graphs_replay_its_table() -> None:
    class Sigmas:
        """The smallest plan: a number per row."""

        def __init__(self, values: Tensor) -> None:
            self.values = values

        def at(self, row: Any) -> Any:
            return self.values[row] if isinstance(row, int) else self.values.index_select(0, row)[0]

        def signature(self) -> Any:
            return self.values.shape

        def fixed(self) -> Sigmas:
            return Sigmas(self.values.clone())

        def load(self, other: Sigmas) -> None:
            self.values.copy_(other.values)

    def predict(inputs: Tensor, sigma: Tensor) -> Tensor:
        return torch.tanh(inputs) + sigma

    for config in (SD3, {**SD3, "stochastic_sampling": True}):
        mine = both(config, {"num_inference_steps": 6})[1]
        graphs = StepGraphs(nn.Linear(1, 1), record=lambda program: program.run)
        table, plan = mine.step_table(), Sigmas(mine.sigmas[:-1].clone())
        steps: list[Callable[..., Any] | None] = [
            None,
            lambda row, *rest: graphs.step(predict, plan, table, row, *rest),  # noqa: B023
        ]
        eager, replayed = (
            denoise(
                lambda inputs, row: predict(inputs, plan.at(row)),  # noqa: B023
                table,
                start(),
                torch.tensor([-4.0, 5.0]),
                generator=torch.Generator().manual_seed(1),
                step=step,
            )
            for step in steps
        )
        assert torch.equal(eager, replayed)
        assert len(graphs) == 1


def test_configs_are_diffusers(tmp_path: Path) -> None:
    theirs, mine = (getattr(library, NAME)() for library in (diffusers, ours))
    names = [key for key in mine.config if not key.startswith("_")]
    assert names == [key for key in theirs.config if not key.startswith("_")]
    assert {key: mine.config[key] for key in names} == {key: theirs.config[key] for key in names}
    getattr(diffusers, NAME)(shift=3.0, shift_terminal=0.1).save_pretrained(tmp_path / "theirs")
    read = ours.FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "theirs")
    assert (read.shift, read.config.shift_terminal) == (3.0, 0.1)
    read.save_pretrained(tmp_path / "mine")
    again = getattr(diffusers, NAME).from_pretrained(tmp_path / "mine")
    assert {key: again.config[key] for key in names} == {key: read.config[key] for key in names}


def test_methods_take_the_arguments_of_diffusers() -> None:
    for method in ("set_timesteps", "step", "scale_noise", "time_shift", "set_shift", "set_begin_index"):
        theirs = list(inspect.signature(getattr(getattr(diffusers, NAME), method)).parameters)
        assert list(inspect.signature(getattr(getattr(ours, NAME), method)).parameters) == theirs


def test_inside_diffusers_pipelines() -> None:
    """Pictures of a random Stable Diffusion 3 with diffusers' scheduler and with ours, from text and from a picture."""
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=8, out_channels=4,
        pos_embed_max_size=8,
    ).eval()  # fmt: skip
    vae = diffusers.AutoencoderKL(
        latent_channels=4, block_out_channels=(8,), norm_num_groups=4, shift_factor=0.1
    ).eval()
    prompts = {
        name: torch.randn(1, *shape)
        for name, shape in {
            "prompt_embeds": (6, 16),
            "negative_prompt_embeds": (6, 16),
            "pooled_prompt_embeds": (8,),
            "negative_pooled_prompt_embeds": (8,),
        }.items()
    }
    parts = dict.fromkeys(
        ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    )
    picture = torch.rand(1, 3, 8, 8)
    for kind, more in (
        ("StableDiffusion3Pipeline", {"height": 8, "width": 8}),
        ("StableDiffusion3Img2ImgPipeline", {"image": picture, "height": 8, "width": 8, "strength": 0.6}),
    ):
        pictures = []
        for library in (diffusers, ours):
            scheduler = getattr(library, NAME)(**SD3)
            pipeline = getattr(diffusers, kind)(transformer=transformer, vae=vae, scheduler=scheduler, **parts)
            pipeline.set_progress_bar_config(disable=True)
            pictures.append(
                pipeline(
                    **prompts,
                    **more,
                    num_inference_steps=5,
                    output_type="latent",
                    generator=torch.Generator().manual_seed(0),
                ).images
            )
        torch.testing.assert_close(pictures[1], pictures[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_beta_sigmas": True}, "use_beta_sigmas: expected False, got True"),
        ({"time_shift_type": "cubic"}, "time_shift_type: expected 'exponential' or 'linear', got 'cubic'"),
        ({"num_train_timesteps": 0}, "num_train_timesteps: expected at least 1, got 0"),
        (
            {"use_karras_sigmas": True, "use_exponential_sigmas": True},
            "use_exponential_sigmas: expected False with use_karras_sigmas=True, got True",
        ),
        (
            {"invert_sigmas": True, "stochastic_sampling": True},
            "stochastic_sampling: expected False with invert_sigmas=True, got True",
        ),
    ],
    ids=str,
)
def test_refused_settings(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        getattr(ours, NAME)(**config)


@pytest.mark.parametrize(
    ("config", "run", "message"),
    [
        ({}, {}, "num_inference_steps: expected at least 1, got None"),
        ({}, {"num_inference_steps": 0}, "num_inference_steps: expected at least 1, got 0"),
        ({"use_dynamic_shifting": True}, {"num_inference_steps": 4}, "mu: expected a number with use_dynamic_shifting"),
        ({}, {"sigmas": [0.5, 0.7]}, "sigmas: expected descending values from at most 1 to at least 0, got"),
        ({}, {"sigmas": [1.5, 0.7]}, "sigmas: expected descending values from at most 1 to at least 0, got"),
        ({}, {"timesteps": [1001.0]}, "timesteps: expected descending values from at most 1000 to at least 0, got"),
        ({}, {"sigmas": LINEAR, "num_inference_steps": 4}, "set_timesteps: expected num_inference_steps, sigmas and "),
        ({}, {"sigmas": LINEAR, "timesteps": [5.0]}, "set_timesteps: expected num_inference_steps, sigmas and "),
        ({"shift_terminal": 0.1}, {"num_inference_steps": 1}, "shift_terminal: expected a run whose last sigma is"),
    ],
    ids=str,
)
def test_bad_runs(config: dict[str, Any], run: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        getattr(ours, NAME)(**config).set_timesteps(**run)


def test_bad_steps() -> None:
    mine = both(SD3, {"num_inference_steps": 4})[1]
    for integer in (0, torch.tensor(0)):
        with pytest.raises(ValueError, match=r"timestep: expected one of the floating-point .*, got the integer 0"):
            mine.step(start(), integer, start())
    with pytest.raises(ValueError, match="per_token_timesteps: expected None, got Tensor"):
        mine.step(start(), mine.timesteps[0], start(), per_token_timesteps=torch.ones(2, 3))
    for t in mine.timesteps:
        mine.step(start(), t, start())
    with pytest.raises(ValueError, match="step: expected at most 4 calls after set_timesteps, got one more"):
        mine.step(start(), t, start())


@pytest.mark.parametrize("key", ["use_flow_sigmas", "use_dynamic_shifting"])
def test_flows_are_refused_by_dpmsolver(key: str) -> None:
    with pytest.raises(ValueError, match=f"^{key}: expected False, got True"):
        ours.DPMSolverMultistepScheduler(**{key: True})
