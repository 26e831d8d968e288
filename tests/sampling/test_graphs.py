"""The step that CUDA graphs capture, run on the CPU without a capture: same numbers, and the host reads nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import kolors_fast.schedulers as schedulers
from kolors_fast import KolorsPipeline, KolorsUNet, without
from kolors_fast.assets import bundled
from kolors_fast.sampling.denoise import denoise
from kolors_fast.sampling.graphs import Program, StepGraphs

KOLORS = {"num_train_timesteps": 1100, "beta_start": 0.00085, "beta_end": 0.014, "steps_offset": 1}


def recorded(program: Program) -> Any:
    """In the place of a capture: the program itself."""
    return program.run


class Shift:
    """The smallest plan: a number per row."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def at(self, row: int | Tensor) -> Tensor:
        return self.values[row] if isinstance(row, int) else self.values.index_select(0, row)[0]

    def signature(self) -> Any:
        return self.values.shape

    def fixed(self) -> Shift:
        return Shift(self.values.clone())

    def load(self, other: Shift) -> None:
        self.values.copy_(other.values)


def predict(inputs: Tensor, shift: Tensor) -> Tensor:
    return (torch.tanh(inputs) + shift).to(inputs.dtype)


RUNS = [
    ("EulerDiscreteScheduler", {}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("DDIMScheduler", {"clip_sample": True}),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
]


@pytest.mark.parametrize(("name", "config"), RUNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_recorded_step_is_the_eager_one(name: str, config: dict[str, Any], dtype: torch.dtype) -> None:
    graphs = StepGraphs(nn.Linear(1, 1), record=recorded)
    for steps, seed in ((7, 0), (7, 1), (5, 2)):
        scheduler = getattr(schedulers, name)(**KOLORS, **config)
        scheduler.set_timesteps(steps)
        table, weights = scheduler.step_table(), torch.tensor([-4.0, 5.0])
        plan = Shift(torch.linspace(-0.5, 0.5, steps) * (1 + seed))
        noise = torch.randn(2, 4, 5, 3, generator=torch.Generator().manual_seed(seed)) * scheduler.init_noise_sigma
        results = []
        for step in (
            None,
            lambda row, sample, *rest: graphs.step(predict, plan, table, row, sample, *rest),  # noqa: B023
        ):
            results.append(
                denoise(
                    lambda inputs, row: predict(inputs, plan.at(row)),  # noqa: B023
                    table,
                    noise.to(dtype),
                    weights,
                    generator=torch.Generator().manual_seed(9),
                    step=step,
                )
            )
        assert torch.equal(*results)
    assert len(graphs) == 2  # one for each number of steps


def test_the_least_recently_used_graph_goes_first() -> None:
    made = []
    graphs = StepGraphs(nn.Linear(1, 1), keep=2, record=lambda program: made.append(program) or program.run)
    scheduler = schedulers.EulerDiscreteScheduler(**KOLORS)
    scheduler.set_timesteps(3)
    plan = Shift(torch.zeros(3))

    def step(side: int) -> None:
        sample = torch.zeros(1, 4, side, side)
        graphs.step(predict, plan, scheduler.step_table(), 0, sample, torch.ones(1), None, None)

    for side, captures in ((2, 1), (3, 2), (2, 2), (4, 3), (2, 3), (3, 4)):
        step(side)
        assert len(made) == captures
        assert len(graphs) <= 2
    with pytest.raises(ValueError, match="graphs: keep: expected at least 1, got 0"):
        StepGraphs(nn.Linear(1, 1), keep=0)


def test_what_is_baked_in_means_another_capture() -> None:
    made = []
    model = nn.Linear(2, 2)
    graphs = StepGraphs(model, record=lambda program: made.append(program) or program.run)
    scheduler = schedulers.EulerDiscreteScheduler(**KOLORS)
    scheduler.set_timesteps(3)
    sample, plan, table = torch.zeros(1, 4, 2, 2), Shift(torch.zeros(3)), scheduler.step_table()

    def captures() -> int:
        graphs.step(predict, plan, table, 0, sample, torch.ones(1), None, None)
        return len(made)

    assert captures() == captures() == 1
    with torch.no_grad():
        model.weight.mul_(2)  # in place: the graph reads the new values
    assert captures() == 1
    model.weight = nn.Parameter(torch.zeros(2, 2))
    assert captures() == 2
    model.scaling = {"default": 1.0}
    assert captures() == 3
    model.scaling["default"] = 0.5  # a number inside a kernel's arguments
    assert captures() == 4
    with without("geglu"):
        assert captures() == 5


class HostReads(TorchDispatchMode):
    """Fails where the host would wait for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_the_unets_program_neither_reads_nor_moves_anything() -> None:
    pipeline = KolorsPipeline.from_pretrained(bundled("kolors-tiny"), torch_dtype=torch.float32)
    unet, scheduler = pipeline.unet, pipeline.scheduler
    scheduler.set_timesteps(4)
    torch.manual_seed(0)
    text = torch.randn(2, 20, unet.config.encoder_hid_dim)
    text[:, :11] = text[:, :1]
    features = unet.add_embedding.linear_1.in_features - 6 * unet.config.addition_time_embed_dim
    added = {"text_embeds": torch.randn(2, features), "time_ids": torch.full((2, 6), 128.0)}
    prompt = unet.read_prompt(text, added, torch.float32, keys_multiple=16)
    assert prompt.text.shape[1] == 16  # nine tokens, a pad and six keys that do not count
    plan, table = unet.plan_steps(scheduler.timesteps, prompt), scheduler.step_table()
    sample = torch.randn(1, 4, 16, 16) * scheduler.init_noise_sigma
    weights = torch.tensor([-4.0, 5.0])
    program = Program(unet.denoise, plan, table, sample, weights)
    addresses = [t.data_ptr() for t in (program.sample, program.denoised, program.row, program.coefficients)]
    for row in range(4):
        predictions = unet.denoise(torch.cat([sample * table.input_scale[row]] * 2), plan.at(row))
        want, denoised = table.advance(row, sample, predictions, weights)
        program.load(plan, table, row, sample, weights, None, None)
        program.run()
        assert torch.allclose(program.sample, want, rtol=1e-5, atol=1e-5)
        assert torch.allclose(program.denoised, denoised, rtol=1e-4, atol=1e-4)
        sample = want
    with HostReads():
        program.run()
    assert addresses == [t.data_ptr() for t in (program.sample, program.denoised, program.row, program.coefficients)]


def test_pictures_of_graphs_are_those_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of 5 to 20 tokens share a program; callbacks see each step and may change it."""
    pipeline = KolorsPipeline.from_pretrained(bundled("kolors-tiny"), torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    seen: list[Tensor] = []

    def callback(_: Any, row: int, __: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(tensors["latents"])
        return {"latents": tensors["latents"] * 0.5} if row == 1 else {}

    def draw(prompt: Any, **arguments: Any) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipeline(prompt, num_inference_steps=4, generator=generator, output_type="latent", **arguments).images  # type: ignore[return-value]

    calls: list[Any] = [("red circle", {}), ("blue star below green disc", {}), ("red circle", {"guidance_scale": 1.0}),
             ("red circle", {"callback_on_step_end": callback})]  # fmt: skip
    two = {"latents": torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))}
    calls += [(["a", "b"], two | {"guidance_scale": scales}) for scales in ([5.0, 2.0], [3.0, 1.0], 4.0)]
    want = [draw(prompt, **arguments) for prompt, arguments in calls]
    expected_seen = [x.clone() for x in seen]
    seen.clear()
    graphs = pipeline._graphs = StepGraphs(pipeline.unet, record=recorded)
    for (prompt, arguments), expected in zip(calls, want, strict=True):
        got = draw(prompt, **arguments)
        assert (got - expected).abs().max() < 1e-4 * expected.abs().max()
    assert len(graphs) == 4  # with and without guidance, of two prompts with one and with two scales
    assert len({x.data_ptr() for x in seen}) == 4  # what a callback keeps is not overwritten
    for a, b in zip(seen, expected_seen, strict=True):
        assert (a - b).abs().max() < 1e-4 * b.abs().max()


def test_a_fresh_model_is_captured_once() -> None:
    """Its first run, the warm-up of the capture, joins weights and so moves them."""
    pipeline = KolorsPipeline.from_pretrained(bundled("kolors-tiny"), torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    made = []

    def warmed_up(program: Program) -> Any:
        program.run()
        made.append(program)
        return program.run

    pipeline._graphs = StepGraphs(pipeline.unet, record=warmed_up)
    pipeline("red circle", num_inference_steps=4, output_type="latent")
    assert len(made) == len(pipeline._graphs) == 1


def test_a_graph_on_a_cpu_is_refused() -> None:
    pipeline = KolorsPipeline.from_pretrained(bundled("kolors-tiny"), torch_dtype=torch.float32)
    with pytest.raises(ValueError, match="enable_cuda_graphs: expected a pipeline on a CUDA device, got one on cpu"):
        pipeline.enable_cuda_graphs()
    pipeline._graphs = StepGraphs(pipeline.unet)  # moved away after it was enabled
    pipeline.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match="graphs: expected a model on a CUDA device, got one on cpu"):
        pipeline("red circle", num_inference_steps=2)
    pipeline.disable_cuda_graphs()
    pipeline("red circle", num_inference_steps=2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures CUDA graphs, and torch sees no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_captured_pictures_on_a_gpu(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # else fp32 convolutions err by 1e-3 of the largest
    pipeline = KolorsPipeline.from_pretrained(bundled("kolors-tiny"), torch_dtype=dtype).to("cuda")
    pipeline.set_progress_bar_config(disable=True)

    def draw(prompt: str, **arguments: Any) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        arguments = {"num_inference_steps": 8, "generator": generator, "output_type": "latent", **arguments}
        return pipeline(prompt, **arguments).images.float()  # type: ignore[union-attr]

    calls: list[dict[str, Any]] = [{}, {"guidance_scale": 1.0}, {"height": 96}, {"num_inference_steps": 5}, {}]
    want = [draw("blue star below green disc", **arguments) for arguments in calls]
    pipeline.enable_cuda_graphs(keep=2)
    for arguments, expected in zip(calls, want, strict=True):
        error = (draw("blue star below green disc", **arguments) - expected).norm() / expected.norm()
        assert error < (1e-5 if dtype == torch.float32 else 0.05)
    assert isinstance(pipeline.unet, KolorsUNet)
    for parameter in pipeline.unet.parameters():  # an edit in place needs no other capture
        parameter.data.mul_(1.01)
    got = draw("blue star below green disc")
    pipeline.disable_cuda_graphs()
    expected = draw("blue star below green disc")
    assert (got - expected).norm() / expected.norm() < (1e-5 if dtype == torch.float32 else 0.05)
