"""A training recipe: a TOML file read into dataclasses; unknown keys are errors."""

from __future__ import annotations

import dataclasses
import difflib
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar, Union, get_args, get_origin, get_type_hints

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from kolors_fast.pipelines.sd3_text import DROP
from kolors_fast.schedulers.rectified_flow import parse_density

from .lora import LoRAConfig
from .power_sgd import PowerSGDConfig

RECIPES = Path(__file__).parent / "recipes"

T = TypeVar("T")


class RecipeError(ValueError):
    """A recipe that cannot be read, named by file and key."""


@dataclass(frozen=True)
class TokenizerRecipe:
    """The sentencepiece model trained on captions."""

    pieces: int
    captions: int  # sampled to train it


@dataclass(frozen=True)
class TextTokenizerRecipe:
    """A tokenizer of CLIP's or T5's kind."""

    captions: int  # sampled to train it
    length: int  # tokens that every prompt is padded to


@dataclass(frozen=True)
class Stage:
    """One run of the trainer: warm-up, a constant learning rate, then a linear decay to zero."""

    name: str
    objective: str
    steps: int
    batch: int  # of all processes together
    learning_rate: float
    warmup: int = 200
    decay: int = 1000  # the last steps
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    clip_norm: float = 1.0
    ema: float = 0.999
    precision: str = "bf16"  # of matrix products and convolutions; weights and optimizer stay fp32
    # with precision "fp16". "block": it is that of a denoiser's residual branches, each under a scale of its own, see
    # `BlockGradientScaler`; "global": of all products, under one scale for the loss, as `torch.amp.GradScaler`'s
    gradient_scale: str = "block"
    activations: str = "all"  # kept for the backward pass: all, "selective" or "full", see `checkpoint_activations`
    accumulate: int = 1  # parts of a process's share of a batch, one after the other: less memory, the same gradient
    checkpoint_every: int = 500
    monitor_every: int = 1000
    lora: LoRAConfig | None = None  # an adapter is trained in place of the weights
    power_sgd: PowerSGDConfig | None = None  # replicas of the weights exchange compressed gradients
    stop_on_failed_checkpoint: bool = True  # else a full disk is told, and training goes on

    # what may differ when a run is resumed: it changes weights by no more than rounding
    HARMLESS: ClassVar[frozenset[str]] = frozenset(
        {"accumulate", "checkpoint_every", "monitor_every", "stop_on_failed_checkpoint"}
    )

    def __post_init__(self) -> None:
        if self.lora is not None and not isinstance(self, PoolStage):
            raise RecipeError(f"stage '{self.name}': lora: expected only where a denoiser is trained")
        if self.power_sgd is not None and self.precision == "fp16":
            raise RecipeError(f"stage '{self.name}': precision: expected fp32 or bf16 with power_sgd, got 'fp16'")
        if self.power_sgd is not None and self.accumulate > 1:
            raise RecipeError(f"stage '{self.name}': accumulate: expected 1 with power_sgd, got {self.accumulate}")
        for key in ("steps", "batch", "accumulate", "checkpoint_every", "monitor_every"):
            if getattr(self, key) < 1:
                raise RecipeError(f"stage '{self.name}': {key}: expected 1 or more, got {getattr(self, key)}")
        if not 0 <= self.warmup + self.decay <= self.steps:
            raise RecipeError(
                f"stage '{self.name}': warmup + decay: expected at most steps = {self.steps}, "
                f"got {self.warmup} + {self.decay}"
            )
        if not 0 <= self.ema < 1:
            raise RecipeError(f"stage '{self.name}': ema: expected 0 <= ema < 1, got {self.ema}")
        kept = ("all", "selective", "full") if isinstance(self, PoolStage) else ("all",)
        if self.activations not in kept:
            raise RecipeError(
                f"stage '{self.name}': activations: expected one of {', '.join(kept)}, got '{self.activations}'"
            )
        if self.accumulate > 1 and not isinstance(self, PoolStage):
            raise RecipeError(f"stage '{self.name}': accumulate: expected 1 where no denoiser is trained")
        if self.gradient_scale not in ("block", "global"):
            raise RecipeError(
                f"stage '{self.name}': gradient_scale: expected 'block' or 'global', got '{self.gradient_scale}'"
            )
        if self.gradient_scale == "global" and self.precision != "fp16":
            raise RecipeError(
                f"stage '{self.name}': gradient_scale: expected 'global' only with precision 'fp16', "
                f"got it with '{self.precision}'"
            )
        halves = self.gradient_scale == "global" or isinstance(self, PoolStage)
        precisions = ("fp32", "bf16", "fp16") if halves else ("fp32", "bf16")
        if self.precision not in precisions:
            raise RecipeError(
                f"stage '{self.name}': precision: expected one of {', '.join(precisions)}, got '{self.precision}'"
            )

    @property
    def autocast(self) -> str:
        """The precision of what no scaler of branches has in hand."""
        return "fp32" if self.precision == "fp16" and self.gradient_scale == "block" else self.precision


@dataclass(frozen=True)
class AutoencoderStage(Stage):
    """Reconstruction from noisy latents, on pictures rendered as they are needed."""

    sizes: tuple[tuple[int, int], ...] = ((128, 128),)  # height, width; a batch has one of them
    noise: float = 0.6  # largest standard deviation of the noise on latents
    moment_weight: float = 0.05
    colour_weight: float = 0.1


@dataclass(frozen=True)
class LanguageModelStage(Stage):
    """Next-token prediction on captions, whose last token's state must also tell what the caption asks for."""

    reading_weight: float = 0.3  # of the cross-entropies of the request's parts, which are summed


@dataclass(frozen=True)
class TextEncoderStage(Stage):
    """A text encoder on captions, off whose pooled state what the caption asks for must be read."""

    component: str = "text_encoder"  # which of the recipe's
    reading_weight: float = 1.0  # of the cross-entropies of the request's parts, which are summed
    masked: float = 0.15  # share of the words that are hidden in every second caption

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.masked < 1:
            raise RecipeError(f"stage '{self.name}': masked: expected 0 < masked < 1, got {self.masked}")


@dataclass(frozen=True)
class PoolStage(Stage):
    """Training on latents: of real pictures, from a folder that `kolors-fast precompute` has made, or of a pool of
    scenes that is rendered and encoded once."""

    objects: ClassVar[int | None] = None  # of a scene; None: one to three

    features: str = ""  # the folder; "": a pool, which the keys below describe
    prompts: tuple[str, ...] = ()  # drawn now and then by a pipeline that is trained further
    validation: str = ""  # features of other pictures, on which it is validated then
    synthetic: float = 0.5  # with features: share of the synthetic captions among those of pictures that have both
    scenes: int = 40000
    captions: int = 4  # per scene
    area: int = 256  # side of the square whose area no bucket exceeds
    shortest: int = 256  # side of a bucket, in pixels
    longest: int = 256
    divisor: int = 64  # of the sides
    square_share: float = 0.6  # of the scenes; the others have an aspect ratio between 1:2 and 2:1


@dataclass(frozen=True)
class NoiseStage(PoolStage):
    """Noise prediction."""

    caption_dropout: float = 0.1
    snr_gamma: float = 5.0  # min-SNR weighting (Hang et al. 2023); 0 turns it off
    timestep_power: float = 1.0  # above 1, high noise is drawn more often
    timestep_falloff: float = 1.0  # above 1, the highest noise is drawn less often
    noise_offset: float = 0.0  # standard deviation of what each picture's channels have in common

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("timestep_power", "timestep_falloff"):
            if not getattr(self, key) > 0:
                raise RecipeError(f"stage '{self.name}': {key}: expected more than 0, got {getattr(self, key)}")


@dataclass(frozen=True)
class EpsilonStage(NoiseStage):
    """Noise or velocity prediction by Kolors' UNet."""

    prediction: str = "epsilon"  # or "v"
    train_steps: int = 1100  # of the noise schedule
    beta_end: float = 0.014

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prediction not in ("epsilon", "v"):
            raise RecipeError(f"stage '{self.name}': prediction: expected 'epsilon' or 'v', got '{self.prediction}'")


@dataclass(frozen=True)
class LearnedVarianceStage(NoiseStage):
    """Prediction of the noise and of the reverse step's variance."""

    snr_gamma: float = 0.0


@dataclass(frozen=True)
class ClassConditionalStage(LearnedVarianceStage):
    """From the kind (colour and shape) of a lone object, by a DiT that PixArt then starts from."""

    objects: ClassVar[int | None] = 1


@dataclass(frozen=True)
class CaptionConditionalStage(LearnedVarianceStage):
    """From captions, by PixArt."""

    linear_captions: bool = False  # the caption projection becomes linear, and is not trained: see `make_linear`


@dataclass(frozen=True)
class DenoiserStage(PoolStage):
    """Training of the MM-DiT. With classifier-free guidance, the empty caption's prediction is the negative one."""

    caption_dropout: float = 0.1  # share of the captions that the empty one replaces
    encoder_dropout: float = DROP  # share in which the output of a text encoder, each by itself, is zero

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("caption_dropout", "encoder_dropout"):
            if not 0 <= getattr(self, key) < 1:
                raise RecipeError(f"stage '{self.name}': {key}: expected 0 <= {key} < 1, got {getattr(self, key)}")


@dataclass(frozen=True)
class RectifiedFlowStage(DenoiserStage):
    """Prediction of the velocity on straight paths."""

    density: str = "logit_normal(0, 1)"  # of the times, see `parse_density`
    shift: float = 1.0  # of the times, for the resolution: alpha t / (1 + (alpha - 1) t)

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            parse_density(self.density)
        except ValueError as error:
            raise RecipeError(f"stage '{self.name}': {error}") from None
        if not self.shift > 0:
            raise RecipeError(f"stage '{self.name}': shift: expected more than 0, got {self.shift}")


@dataclass(frozen=True)
class EpsilonLinearStage(DenoiserStage):
    """Prediction of the noise on the schedule of latent diffusion, to compare with: "eps/linear" of the SD3 paper."""


@dataclass(frozen=True)
class Recipe:
    """Models of one system and the stages that train them.

    Model tables hold the models' own config values. Where a table names a `pretrained` component (of a bundled model,
    such as "kolors-tiny/vae", or a folder), it is taken as it is, and other keys change its config.
    """

    objectives: ClassVar[dict[str, type[Stage]]]  # of its stages, by the name that recipes use

    name: str
    seed: int
    stages: tuple[Stage, ...]


@dataclass(frozen=True)
class KolorsRecipe(Recipe):
    """Kolors: an autoencoder, ChatGLM3 and a UNet, all trained from nothing."""

    objectives: ClassVar[dict[str, type[Stage]]] = {
        "autoencoder": AutoencoderStage,
        "language_model": LanguageModelStage,
        "epsilon": EpsilonStage,
    }

    tokenizer: TokenizerRecipe
    vae: dict[str, Any]
    text_encoder: dict[str, Any]
    unet: dict[str, Any]
    scheduler: dict[str, Any]  # of the pipeline that is exported


@dataclass(frozen=True)
class SD3Recipe(Recipe):
    """Stable Diffusion 3: two CLIPs of one tokenizer, T5, the MM-DiT and a given autoencoder."""

    objectives: ClassVar[dict[str, type[Stage]]] = {
        "clip": TextEncoderStage,
        "t5": TextEncoderStage,
        "rectified_flow": RectifiedFlowStage,
        "epsilon_linear": EpsilonLinearStage,
    }

    tokenizer: TextTokenizerRecipe  # of both CLIPs
    tokenizer_3: TextTokenizerRecipe
    vae: dict[str, Any]
    text_encoder: dict[str, Any]
    text_encoder_2: dict[str, Any]
    text_encoder_3: dict[str, Any]
    transformer: dict[str, Any]
    scheduler: dict[str, Any]


@dataclass(frozen=True)
class PixArtRecipe(Recipe):
    """PixArt-alpha: a class-conditional DiT and the transformer made of it, between a given T5 and a given VAE."""

    objectives: ClassVar[dict[str, type[Stage]]] = {
        "class_conditional": ClassConditionalStage,
        "learned_variance": CaptionConditionalStage,
    }

    tokenizer: dict[str, Any]
    text_encoder: dict[str, Any]
    vae: dict[str, Any]
    transformer: dict[str, Any]


@dataclass(frozen=True)
class PretrainedRecipe(Recipe):
    """A pipeline of any system that is there, whose denoiser is trained further on features of real pictures."""

    objectives: ClassVar[dict[str, type[Stage]]] = {
        "epsilon": EpsilonStage,
        "rectified_flow": RectifiedFlowStage,
        "learned_variance": CaptionConditionalStage,
    }

    pretrained: str  # a folder in diffusers' layout, or a bundled model


SYSTEMS: dict[str, type[Recipe]] = {
    "kolors": KolorsRecipe,
    "sd3": SD3Recipe,
    "pixart": PixArtRecipe,
    "pretrained": PretrainedRecipe,
}


def load_recipe(recipe: str | Path) -> Recipe:
    """Read a TOML file, or a bundled recipe by name.

    Raises:
        RecipeError: no such file, not TOML, a key that is unknown or missing, or a value of the wrong type.
    """
    path = Path(recipe)
    if not path.suffix:
        path = RECIPES / f"{recipe}.toml"
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        names = ", ".join(sorted(p.stem for p in RECIPES.glob("*.toml")))
        raise RecipeError(f"recipe '{recipe}': no such file, and the bundled recipes are: {names}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path}: not valid TOML: {error}") from error
    return parse_recipe(table, str(path))


def parse_recipe(table: dict[str, Any], where: str) -> Recipe:
    """A recipe from its TOML table; `where` begins every error."""
    table = dict(table)
    system = table.pop("system", "kolors")
    recipe = SYSTEMS.get(system) if isinstance(system, str) else None
    if recipe is None:
        raise RecipeError(f"{where}: system: expected one of {sorted(SYSTEMS)}, got {system!r}")
    stages = []
    for stage in table.pop("stage", []):
        name = f"{where}: stage '{stage.get('name', '?')}'"
        objective = stage.get("objective", "")
        if objective not in recipe.objectives:
            raise RecipeError(f"{name}: objective: expected one of {sorted(recipe.objectives)}, got {objective!r}")
        stages.append(_parse(recipe.objectives[objective], stage, name))
    if not stages:
        raise RecipeError(f"{where}: expected at least one [[stage]], got none")
    names = [stage.name for stage in stages]
    if len(set(names)) != len(names):
        raise RecipeError(f"{where}: stage names: expected each once, got {names}")
    return _parse(recipe, {**table, "stages": tuple(stages)}, where)


def _parse(kind: type[T], table: dict[str, Any], where: str) -> T:
    """A dataclass from a table, with every key and type checked."""
    hints = get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(table) - set(fields))
    if unknown:
        near = difflib.get_close_matches(unknown[0], fields, n=1)
        meant = f"did you mean '{near[0]}'?" if near else f"expected some of {sorted(fields)}"
        raise RecipeError(f"{where}: unknown key '{unknown[0]}'; {meant}")
    required = [
        f.name for f in fields.values() if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in required if name not in table]
    if missing:
        raise RecipeError(f"{where}: missing key '{missing[0]}'")
    values = {name: _convert(value, hints[name], f"{where}: {name}") for name, value in table.items()}
    try:
        return kind(**values)
    except RecipeError:
        raise
    except ValueError as error:  # of a dataclass that others make, too
        raise RecipeError(f"{where}: {error}") from None


def _convert(value: Any, hint: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):  # type: ignore[arg-type]
            return value
        if isinstance(value, dict):
            return _parse(hint, value, where)  # type: ignore[arg-type]
        raise RecipeError(f"{where}: expected a table, got {value!r}")
    origin = get_origin(hint)
    if origin is tuple and isinstance(value, list | tuple):
        inner = get_args(hint)
        if len(inner) == 2 and inner[1] is Ellipsis:
            return tuple(_convert(v, inner[0], where) for v in value)
        if len(inner) == len(value):
            return tuple(_convert(v, h, where) for v, h in zip(value, inner, strict=True))
    elif origin in (Union, types.UnionType):
        (inner,) = (one for one in get_args(hint) if one is not type(None))  # None is a key left out
        return _convert(value, inner, where)
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif isinstance(value, origin or hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise RecipeError(f"{where}: expected {getattr(hint, '__name__', hint)}, got {value!r}")
