"""Per-resblock gradient scaling: a scale for each residual branch, so that float16 holds the gradients of all of them.

Gradients of activations span more powers of two from the first to the last block of a deep network than float16 has, so
that under one scale for the loss some of them underflow. Here the residual stream and its gradient stay in fp32, branch
k computes in float16, and its gradient is multiplied by a scale s_k of its own while it is inside of the branch:

    forward    stream x (fp32) ------> f_k in float16 ------> to fp32, added to the stream
    backward   g / s_k, to fp32 <----- f_k in float16 <------ g * s_k, to float16
               NaN, Inf -> 0                                  NaN, Inf -> 0

So the overflow of one branch ends at its entrance, and only that branch's scale is lowered. The gradients of a branch's
parameters are s_k times too large until `BlockGradientScaler.unscale_`.

Source: Ramesh et al., Zero-Shot Text-to-Image Generation, arXiv 2102.12092, section 2.4 and appendix D.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kolors_fast.models import attention, dit_layers, layers, mmdit_blocks, unet_blocks
from kolors_fast.ops.scale_and_filter import scale_and_filter
from kolors_fast.ops.unscale_and_filter import unscale_and_filter
from kolors_fast.ops.unscale_grads_ import unscale_grads_

from . import dit
from .parallel import World, locals_of
from .update import step_at_norm

# log2(s / M) in thousandths, so that a thousand updates without overflow are a doubling exactly: the paper's rule
START, LEAST, MOST = 13_000, 7_000, 24_000
RISE, FALL = 1, 500
PATIENCE = 125  # updates in which a scale falls at most once


# ---- what the branches are


@dataclass(frozen=True, eq=False)
class Branch:
    """A residual branch: `module.method(...)`, which the caller adds to the residual stream.

    Args:
        name: its place in the model.
        method: takes the stream, and whatever else it reads, as tensors, and returns a tensor or a tuple of them.
        layers: the names of those submodules whose parameters are the branch's; none: all are.
        before: a method that computes a part of the branch ahead. `method` takes its result inside of a tuple.
        rounds: whether what enters is rounded to float16 at once; not where a norm in fp32 comes first.
    """

    name: str
    module: nn.Module
    method: str = "forward"
    layers: tuple[str, ...] = ()
    before: str | None = None
    rounds: bool = True

    def parameters(self) -> Iterator[nn.Parameter]:
        for part in [self.module.get_submodule(name) for name in self.layers] or [self.module]:
            yield from part.parameters()


_RESNET = {"method": "residual", "layers": ("norm1", "conv1", "norm2", "conv2"), "rounds": False}
_KINDS: dict[type[nn.Module], dict[str, Any]] = {
    layers.ResnetBlock: _RESNET,
    attention.Attention: {"before": "keys_values"},
    mmdit_blocks.Attention: {},
    mmdit_blocks.JointAttention: {},
    dit.SelfAttention: {},
    unet_blocks.FeedForward: {},
    dit_layers.FeedForward: {},
    dit.FeedForward: {},
}


def residual_branches(module: nn.Module) -> list[Branch]:
    """The branches of a KolorsUNet, MMDiT, PixArtTransformer or DiT, in the order of its modules.

    They are all attentions and feed-forward layers behind their norms, and in the UNet's residual blocks what lies
    beside the shortcut, norms included. Branches of which nothing trains are left out and stay as they are: without
    gradients of parameters nothing shows that they overflow.

    Raises:
        ValueError: there are none.
    """
    found = [Branch(name, part, **_KINDS[type(part)]) for name, part in module.named_modules() if type(part) in _KINDS]
    found = [branch for branch in found if any(p.requires_grad for p in branch.parameters())]
    if not found:
        raise ValueError(f"module: expected a denoiser with residual branches that train, got {type(module).__name__}")
    return found


# ---- the ends of a branch


class _Entrance(torch.autograd.Function):
    """x, rounded to a dtype or not; its gradient, which has been scaled, unscaled and filtered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.scale, ctx.dtype = scale, x.dtype
        return x.view_as(x) if x.dtype == dtype else x.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return unscale_and_filter(grad, ctx.scale, dtype=ctx.dtype), None, None


class _End(torch.autograd.Function):
    """y in fp32; its gradient scaled, filtered and rounded to y's dtype."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, scale: Tensor) -> Tensor:
        ctx.scale, ctx.dtype = scale, y.dtype
        return y.view_as(y) if y.dtype == torch.float32 else y.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return scale_and_filter(grad, ctx.scale, dtype=ctx.dtype), None


class _Scaled:
    """A method of a branch between the branch's ends, where gradients are wanted; elsewhere the method as it is.

    It stands in the module as a bound method, which a copy of the module (the average of its weights) binds to itself;
    hooks around the module, fused paths and gradient checkpointing see nothing of it.
    """

    def __init__(
        self, function: Callable[..., Any], scale: Tensor, dtype: torch.dtype, *, rounds: bool, ends: bool
    ) -> None:
        self.function, self.scale, self.dtype = function, scale, dtype
        self.rounds, self.ends = rounds, ends

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.function(module, *args, **kwargs)
        half = self.dtype != torch.float32
        with torch.autocast(self.scale.device.type, self.dtype) if half else nullcontext():
            result = self.function(
                module, *map(self._enter, args), **{key: self._enter(value) for key, value in kwargs.items()}
            )
        if not self.ends:
            return result
        return tuple(map(self._end, result)) if isinstance(result, tuple) else self._end(result)

    def _enter(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.requires_grad:
            return value
        return _Entrance.apply(value, self.scale, self.dtype if self.rounds else value.dtype)

    def _end(self, value: Any) -> Any:
        return value if value is None else _End.apply(value, self.scale)


# ---- the scales


class _Found(NamedTuple):
    """What the gradients of one update were found to be."""

    norm: Tensor  # fp32 []
    nonfinite: Tensor  # bool []
    bad: Tensor  # bool [branches + 1]: a gradient is not finite; the last one is the parameters' outside
    seen: Tensor  # bool [branches + 1]: there are gradients


class BlockGradientScaler:
    """Trains the branches of a module in float16, each under a gradient scale of its own.

        scaler = BlockGradientScaler(module)
        ...
        loss.backward()                       gradients of several backward passes may add up
        scaler.step(optimizer, clip_norm)     unscales, clips and updates, or leaves everything as it is
        scaler.update()                       the scales

    Parameters, gradients and moments are fp32, and so is all that lies outside of branches: call the module without
    autocast. Inside, autocast rounds weights and activations to float16. All scales, counters and flags stay on the
    device, and nothing waits for it.

    A scale s begins at M 2^13 for M processes, and after each update, skipped or not,

        s *= 2^(1/1000)   where all gradients of its branch's parameters were finite
        s /= sqrt(2)      where one was not, but at most once in 125 updates

    within [M 2^7, M 2^24]. For one branch's overflow the whole update is skipped, and the other scales rise all the
    same. Where a branch had no gradients its scale stays as it is.

    Args:
        module: fp32, on one device; LoRA layers go in before this. `World.shard` comes after it and before the first
            update, so that weights are gathered around what runs between a branch's ends.
        branches: default `residual_branches(module)`.
        world_size: M, where each process divides its loss by the samples of all, and gradients are summed. It is 1
            where the loss is a mean over a process's own samples, and gradients are averaged, as `World` does.
        world: the processes over which parameters will be sharded.
        dtype: float16; or float32, to see what the scaling by itself does.

    Raises:
        ValueError: a parameter is in two branches or not in the module, a branch is scaled already, a dtype is wrong.
    """

    def __init__(
        self,
        module: nn.Module,
        branches: Sequence[Branch] | None = None,
        *,
        world_size: int = 1,
        world: World | None = None,
        dtype: torch.dtype = torch.float16,
    ) -> None:
        self.branches = tuple(residual_branches(module) if branches is None else branches)
        self.world_size, self.world, self.dtype = world_size, world or World(), dtype
        parameters = list(module.parameters())
        _check_dtypes(dtype, parameters)
        self._owner = _owners(parameters, self.branches)
        self._module = module
        self._parameters: list[nn.Parameter] = []  # taken when first needed, for sharding replaces them
        device, count = parameters[0].device, len(self.branches)
        self._exponents = torch.full((count,), START, device=device)
        self._since = torch.full((count,), PATIENCE, device=device)  # updates since a fall
        self._scales = torch.ones(count + 1, device=device)  # the last one is the parameters' outside of branches
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)  # updates
        self._set_scales()
        self._present: list[bool] = []  # which parameters had gradients, and what follows from that
        self._index = self._seen = torch.empty(0)
        self._found: _Found | None = None
        self._install()

    @property
    def scales(self) -> Tensor:
        """fp32 [branches]"""
        return self._scales[:-1]

    @torch.no_grad()
    def unscale_(self) -> tuple[Tensor, Tensor]:
        """Bring the gradients to their true size, once per update.

        Under torch.distributed the processes agree on what is not finite; average the gradients before.

        Returns:
            norm of all gradients, fp32 []; and whether one is not finite, bool [], so that the update will be skipped.
        """
        if self._found is None:
            self._found = self._unscale()
        return self._found.norm, self._found.nonfinite

    def step(self, optimizer: torch.optim.Optimizer, clip_norm: float) -> None:
        """Clip the gradients to a norm and update the parameters; if a gradient is not finite, change nothing.

        Raises:
            ValueError: the optimizer cannot skip an update on the device.
        """
        norm, nonfinite = self.unscale_()
        step_at_norm(optimizer, norm, nonfinite.float(), clip_norm)

    @torch.no_grad()
    def update(self) -> None:
        """Let the scales follow what the last update's gradients were.

        Raises:
            RuntimeError: it has not been looked at, by `unscale_` or `step`.
        """
        if self._found is None:
            raise RuntimeError("update: expected unscale_ or step before it, got neither since the last update")
        bad, seen = self._found.bad[:-1], self._found.seen[:-1]
        self._since.add_(1).clamp_(max=PATIENCE)
        falls = bad & (self._since >= PATIENCE)
        self._exponents.add_(RISE * (seen & ~bad) - FALL * falls.long()).clamp_(LEAST, MOST)
        self._since.masked_fill_(falls, 0)
        self.skipped += self._found.nonfinite
        self._set_scales()
        self._found = None

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, between updates; scales as 1000 log2(s / M)."""
        counts = {"exponents": self._exponents, "since": self._since, "skipped": self.skipped}
        return {"branches": self._names(), **counts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`. Raises ValueError where the branches are others."""
        if state["branches"] != self._names():
            other = set(state["branches"]) ^ set(self._names())
            raise ValueError(f"state: expected these {len(self.branches)} branches, got others: {sorted(other)[:3]}")
        self._exponents.copy_(state["exponents"])
        self._since.copy_(state["since"])
        self.skipped.copy_(state["skipped"])
        self._set_scales()
        self._found = None

    def remove(self) -> None:
        """Leave the module as it was."""
        for branch in self.branches:
            for method in _methods(branch):
                del branch.module.__dict__[method]

    def _install(self) -> None:
        for branch in self.branches:
            if any(method in branch.module.__dict__ for method in _methods(branch)):
                raise ValueError(f"branches: expected each to be scaled once, got {branch.name}, which is already")
        for branch, scale in zip(self.branches, self.scales, strict=True):
            for method in _methods(branch):
                function = getattr(type(branch.module), method)
                ends = method == branch.method
                scaled = _Scaled(function, scale, self.dtype, rounds=branch.rounds, ends=ends)
                branch.module.__dict__[method] = MethodType(scaled, branch.module)

    def _unscale(self) -> _Found:
        self._parameters = self._parameters or list(self._module.parameters())
        present = [parameter.grad is not None for parameter in self._parameters]
        if present != self._present:
            owners = [owner for owner, has in zip(self._owner, present, strict=True) if has]
            self._index = torch.tensor(owners, dtype=torch.int64, device=self._scales.device)
            self._seen = torch.zeros_like(self._scales, dtype=torch.bool).index_fill_(0, self._index, True)
            self._present = present
        grads = locals_of(parameter.grad for parameter in self._parameters if parameter.grad is not None)
        norm, nonfinite = unscale_grads_(grads, self._scales[self._index])
        if self.world.sharded:
            norm = self.world.norm(norm.square())
        flags = torch.zeros_like(self._scales).scatter_reduce_(0, self._index, nonfinite.float(), "amax")
        flags[-1].logical_or_(~norm.isfinite())  # also where finite gradients have squares that are not
        if dist.is_initialized():
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        bad = flags.bool()
        return _Found(norm, bad.any(), bad, self._seen)

    def _set_scales(self) -> None:
        self.scales.copy_(self.world_size * torch.exp2(self._exponents.double() / 1000))

    def _names(self) -> list[str]:
        return [branch.name for branch in self.branches]


def _methods(branch: Branch) -> tuple[str, ...]:
    return (branch.method,) if branch.before is None else (branch.method, branch.before)


def _check_dtypes(dtype: torch.dtype, parameters: Sequence[nn.Parameter]) -> None:
    if dtype not in (torch.float16, torch.float32):
        raise ValueError(f"dtype: expected torch.float16 or torch.float32, got {dtype}")
    for parameter in parameters:
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise ValueError(f"module: expected parameters that train in torch.float32, got {parameter.dtype}")


def _owners(parameters: Sequence[nn.Parameter], branches: Sequence[Branch]) -> list[int]:
    """Of each parameter the number of its branch, or of branches in all."""
    owner = dict.fromkeys(parameters, len(branches))
    for number, branch in enumerate(branches):
        for parameter in branch.parameters():
            if owner.get(parameter) != len(branches):
                where = "another branch" if parameter in owner else "no part of the module"
                raise ValueError(f"branches: expected parameters in one branch each, got {branch.name}'s in {where}")
            owner[parameter] = number
    return list(owner.values())
