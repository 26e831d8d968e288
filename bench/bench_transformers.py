"""MM-DiT and PixArt, a block and a step of each: ours beside diffusers eager and under torch.compile, and each saving
left out.

    pytest bench/bench_transformers.py --benchmark-only

A step is what a picture costs per step in its pipeline, with guidance (the negative and the positive prompt in one
batch) and without the sampler's own arithmetic. Text encoding and decoding are in no row.

- Ours is `Run.predict` in the middle of a run: prompts are read and the modulations of all steps are planned before the
  clock starts, so a step looks its row up, embeds the patches, runs the blocks and makes a picture of the tokens.
- diffusers' is its model called with the features of the prompts and the timestep, as its pipeline calls it: a step
  projects the text, computes all modulations, and in PixArt keys and values of the text, too.
- "reference" is our model on plain PyTorch without any saving, which does the same as diffusers.

A block of ours has its modulations, and PixArt's what it reads of the prompt, beforehand, as in a step; diffusers'
makes them inside, of the conditioning vector or PixArt's shared modulation, and of the projected text.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from providers import PROVIDERS, STEP_PROVIDERS, TOLERANCE, agreeing, steps, without_savings
from torch import Tensor

from kolors_fast import MMDiT, PixArtTransformer
from kolors_fast.benchmark_models import (
    PIXART_SMALL,
    PIXART_TOKENS,
    PIXART_XL2_1024,
    REAL_TOKENS,
    SD3_MEDIUM,
    SD3_SMALL,
    SD35_MEDIUM,
)
from kolors_fast.models.conditioning import Conditioning
from kolors_fast.models.mmdit_blocks import JointBlock, Stream
from kolors_fast.models.pixart_blocks import TransformerBlock
from kolors_fast.models.pixart_conditioning import Prompt, masked, trimmed
from kolors_fast.pipelines.run import Run
from kolors_fast.savings import SAVINGS

diffusers = pytest.importorskip("diffusers", reason="the rival is diffusers, which is not installed")

STEPS, ROW = 25, 12  # of a run, and the one that is timed


class Case(NamedTuple):
    """A model, and what it denoises."""

    name: str
    kind: type[MMDiT | PixArtTransformer]
    config: dict[str, Any]
    side: int  # of the latents
    text: int  # tokens of each prompt
    savings: tuple[str, ...] = ()  # to be left out one by one

    @property
    def group(self) -> str:
        text = f"{self.text} text tokens" if self.kind is MMDiT else f"1 and {REAL_TOKENS} of {self.text} text tokens"
        return f"{self.name}, latent {self.side}x{self.side}, CFG batch 2, {text}"


EVERYWHERE = ("prompt_cache", "step_table", "fused_qkv", "residual_norm", "gelu")
NORMED = {**SD3_SMALL, "qk_norm": "rms_norm"}
SMALL = {
    "mmdit": Case("MM-DiT, 4 blocks of 384", MMDiT, SD3_SMALL, 32, 77 + 77, (*EVERYWHERE, "products")),
    "mmdit_qk_norm": Case("MM-DiT with QK-norm, 4 blocks of 384", MMDiT, NORMED, 32, 77 + 77),
    "pixart": Case(
        "PixArt, 6 blocks of 384", PixArtTransformer, PIXART_SMALL, 32, PIXART_TOKENS,
        (*EVERYWHERE, "pad_collapse", "prompt_fold", "products"),
    ),
}  # fmt: skip
RELEASED = {
    "sd3_medium": Case("SD3-medium 2.03B", MMDiT, SD3_MEDIUM, 128, 77 + 77, (*EVERYWHERE, "joint_qkv")),
    "sd3_medium_long": Case("SD3-medium 2.03B", MMDiT, SD3_MEDIUM, 128, 77 + 256),
    "sd35_medium": Case("SD3.5-medium 2.24B", MMDiT, SD35_MEDIUM, 128, 77 + 256),
    "pixart_xl2": Case(
        "PixArt-XL/2 0.61B", PixArtTransformer, PIXART_XL2_1024, 128, PIXART_TOKENS, (*EVERYWHERE, "pad_collapse"),
    ),
}  # fmt: skip
CASES = SMALL | RELEASED


def inputs_of(case: Case, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """What diffusers' model is called with: a latent for the negative and the positive prompt."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(2, *shape, generator=generator).to(device, dtype)

    inputs = {"timestep": _timesteps(device)[ROW].expand(2), "return_dict": False}
    if case.kind is MMDiT:
        config = MMDiT.empty(case.config).config
        return inputs | {
            "hidden_states": normal(config.in_channels, case.side, case.side),
            "encoder_hidden_states": normal(case.text, config.joint_attention_dim),
            "pooled_projections": normal(config.pooled_projection_dim),
        }
    model = PixArtTransformer.empty(case.config)
    pixels = torch.tensor([[8.0 * case.side] * 2] * 2, device=device)
    added = {"resolution": pixels, "aspect_ratio": torch.ones(2, 1, device=device)} if model.has_sizes else {}
    return inputs | {
        "hidden_states": normal(4, case.side, case.side),
        "encoder_hidden_states": normal(case.text, model.config.caption_channels),
        "encoder_attention_mask": _mask(case.text, device),
        "added_cond_kwargs": {name: added.get(name) for name in ("resolution", "aspect_ratio")},
    }


def _timesteps(device: str) -> Tensor:
    return torch.linspace(1000, 1000 / STEPS, STEPS).round().to(device)


def _mask(length: int, device: str) -> Tensor:
    """Of an empty prompt, of which one token is left, and of a usual one."""
    return (torch.arange(length) < torch.tensor([[1], [REAL_TOKENS]])).long().to(device)


def stepping(model: MMDiT | PixArtTransformer, inputs: dict[str, Any]) -> Callable[[], list[Tensor]]:
    """A step as a pipeline runs it."""

    def read(_tensors: Any, dtype: torch.dtype, keys_multiple: int) -> Any:
        text = inputs["encoder_hidden_states"]
        if isinstance(model, MMDiT):
            return model.read_prompt(text, inputs["pooled_projections"], dtype)
        added, mask = inputs["added_cond_kwargs"], inputs["encoder_attention_mask"]
        return model.read_prompt(text, added, dtype, mask=mask, keys_multiple=keys_multiple)

    sample = inputs["hidden_states"]
    pipeline: Any = SimpleNamespace(denoiser=model, device=sample.device)
    run = Run(pipeline, _timesteps(sample.device), {}, read, pictures=1)
    return lambda: [run.predict(sample, ROW)]


def step_of(case: Case, device: str, selected: set[str]) -> dict[str, Any]:
    """One step by every provider."""
    torch.manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    inputs = inputs_of(case, device, dtype)
    with torch.device(device):
        rival = getattr(diffusers, case.kind.diffusers_name)(**case.config).eval().to(dtype)

    def ours() -> Callable[[], Any]:
        model = case.kind.empty(case.config, dtype)
        model.load_state_dict({name: value.clone() for name, value in rival.state_dict().items()}, assign=True)
        return stepping(model, inputs)

    return steps(rival, inputs, ours, case.savings, device, dtype, selected)


def _race_steps(race: Any, case: Case, provider: str, device: str, selected: set[str], what: str) -> None:
    if (case in SMALL.values()) != (device == "cpu"):
        pytest.skip("a CPU takes steps of the small models, a GPU of the released ones")
    group = f"{what}, {case.group}, {'float32' if device == 'cpu' else 'bfloat16'}"
    line_up = partial(step_of, case, device, selected)
    race(group, provider, line_up, rounds=11, iterations=3, memory=device != "cpu")


@pytest.mark.parametrize("provider", STEP_PROVIDERS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_step(race: Any, case: Case, provider: str, device: str, selected: set[str]) -> None:
    if device == "cpu" and provider == "kolors_fast_graph":
        pytest.skip("a CPU has no CUDA graphs")
    _race_steps(race, case, provider, device, selected & set(STEP_PROVIDERS), "step")


@pytest.mark.parametrize(
    ("case", "provider"),
    [
        pytest.param(case, provider, id=f"{name}-{provider}")
        for name, case in CASES.items()
        if case.savings
        for provider in ("kolors_fast", *(f"without {saving}" for saving in case.savings))
    ],
)
def test_savings(race: Any, case: Case, provider: str, device: str, selected: set[str]) -> None:
    chosen = selected & {"kolors_fast", *(f"without {name}" for name in case.savings)}
    _race_steps(race, case, provider, device, chosen, "step without one saving")


# of a block: (tokens, text, width) of an MM-DiT; (tokens, width, heads) of a PixArt. About those of tiny models at
# 128x128, those of the small models above, and those of SD3-medium and PixArt-XL/2 at 1024x1024
BLOCKS = {
    "tiny": ((64, 65, 128), (64, 128, 2)),
    "small": ((256, 154, 384), (256, 384, 6)),
    "released": ((4096, 333, 1536), (4096, 1152, 16)),
}


def _sizes(size: str, device: str) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    if (size == "released") == (device == "cpu"):
        pytest.skip("a CPU runs the tiny and the small blocks, a GPU the released ones")
    return BLOCKS[size]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("size", BLOCKS)
@pytest.mark.parametrize("kind", ["plain", "QK-norm", "QK-norm and dual attention"])
def test_mmdit_block(race: Any, kind: str, size: str, provider: str, device: str) -> None:
    tokens, text, dim = _sizes(size, device)[0]
    dtype = torch.float32 if device == "cpu" else torch.bfloat16

    def line_up() -> dict[str, Any]:
        from diffusers.models.attention import JointTransformerBlock

        torch.manual_seed(0)
        norms, dual = None if kind == "plain" else "rms_norm", kind.endswith("dual attention")
        rival = JointTransformerBlock(dim, dim // 64, 64, qk_norm=norms, use_dual_attention=dual)
        rival = rival.eval().to(device, dtype)
        x = torch.randn(2, tokens, dim, device=device, dtype=dtype)
        context = torch.randn(2, text, dim, device=device, dtype=dtype)
        vector = torch.randn(2, dim, device=device, dtype=dtype)

        def ours() -> Callable[[], list[Tensor]]:
            block = JointBlock(dim, dim // 64, dual=dual, last=False).eval().to(device, dtype)
            for attention in (block.attn, block.attn2):
                if attention is not None and norms is not None:
                    attention.add_norms()
            block.load_state_dict(rival.state_dict())
            with torch.no_grad():
                cond = Conditioning(None, {m: m.linear(F.silu(vector)) for m in (block.norm1, block.norm1_context)})
            return lambda: [stream.sum() for stream in block(Stream(x), Stream(context), cond)]

        torch.compiler.reset()
        compiled = torch.compile(rival)
        calls = {
            "diffusers": lambda: rival(x, context, vector)[::-1],
            "diffusers_compile": lambda: compiled(x, context, vector)[::-1],
            "reference": without_savings(SAVINGS, ours()),
            "kolors_fast": ours(),
        }
        return agreeing(calls, **TOLERANCE[dtype])

    group = f"MM-DiT block, {kind}, 2x({tokens}+{text})x{dim}, {dtype}".replace("torch.", "")
    race(group, provider, line_up, rounds=20, iterations=5, graph=True)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("size", BLOCKS)
def test_pixart_block(race: Any, size: str, provider: str, device: str) -> None:
    tokens, dim, heads = _sizes(size, device)[1]
    dtype = torch.float32 if device == "cpu" else torch.bfloat16

    def line_up() -> dict[str, Any]:
        from diffusers.models.attention import BasicTransformerBlock

        torch.manual_seed(0)
        rival = BasicTransformerBlock(
            dim, heads, dim // heads, cross_attention_dim=dim, activation_fn="gelu-approximate", attention_bias=True,
            norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
        )  # fmt: skip
        rival = rival.eval().to(device, dtype)
        x = torch.randn(2, tokens, dim, device=device, dtype=dtype)
        text = torch.randn(2, PIXART_TOKENS, dim, device=device, dtype=dtype)
        shared = torch.randn(2, 6 * dim, device=device, dtype=dtype)
        mask = _mask(PIXART_TOKENS, device)
        bias = (1 - mask[:, None].to(dtype)) * -10000.0  # as diffusers' transformer makes it, once a step

        def ours(plain: bool) -> Callable[[], list[Tensor]]:
            block = TransformerBlock(dim, heads, dim).eval().to(device, dtype)
            block.load_state_dict(rival.state_dict())
            with torch.no_grad():
                captions = masked(text, mask) if plain else trimmed(masked(text, mask))
                prompt = Prompt(captions.states, captions, None, dtype, () if plain else [block.attn2])
                cond = Conditioning(prompt, {block: shared + block.scale_shift_table.flatten()})
            return lambda: [block.whole(x, cond)]

        torch.compiler.reset()
        compiled = torch.compile(rival)
        theirs = {"encoder_hidden_states": text, "encoder_attention_mask": bias, "timestep": shared}
        calls = {
            "diffusers": lambda: [rival(x, **theirs)],
            "diffusers_compile": lambda: [compiled(x, **theirs)],
            "reference": without_savings(SAVINGS, ours(plain=True)),
            "kolors_fast": ours(plain=False),
        }
        return agreeing(calls, **TOLERANCE[dtype])

    text = f"1 and {REAL_TOKENS} of {PIXART_TOKENS} text tokens"
    group = f"PixArt block, 2x{tokens}x{dim}, {text}, {dtype}".replace("torch.", "")
    race(group, provider, line_up, rounds=20, iterations=5, graph=True)
