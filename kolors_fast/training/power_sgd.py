"""PowerSGD: replicas send their gradients as products of two thin matrices, and what is lost is added to the next ones.

Of a matrix M_i of gradients, [rows, columns], on replica i, with e_i = 0 at first,

    E_i = M_i + e_i
    P = orthonormalised columns of mean_i(E_i) Q          [rows, r] is sent
    Q = mean_i(E_i)^T P                                   [columns, r] is sent
    G = P Q^T                                             in place of mean_i(M_i)
    e_i = E_i - G

Q begins as a Gaussian matrix that the seed gives to all replicas alike, and goes on from update to update, so that P
turns to what is left in the errors: of gradients that stay the same, all is sent in the end. Without `warm_start` the
first Q is kept; then e Q is 0 after every update, P follows from the newest gradient alone, and a constant one is never
sent whole. r is the stage's rank or, where that is less, the shorter side. A convolution's weight is the matrix [out,
the rest]. A matrix takes part where that at least halves what is sent; what takes no part is averaged as it is, in
fp32.

All that is sent is linear in the errors, so that their mean over the replicas decides what is trained. A checkpoint
holds that mean by the parameters' names, sharded as they are, and gives it to every replica. Where an average is not
finite, errors and Q of all that was sent with it stay as they were, and the update is skipped; errors of what was sent
apart go on, as though it had not been.

Source: Vogels, Karimireddy and Jaggi, PowerSGD, arXiv 1905.13727, with a warm start; between machines that shard
weights, and with a fixed Q, Ramesh et al., Zero-Shot Text-to-Image Generation, arXiv 2102.12092, section 2.5 and
appendix E.
"""

# annotations are evaluated here: DistributedDataParallel looks at those of its hook

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.futures import Future

from .streams import Streams

LEAST_RATE = 2.0  # numbers of a matrix for each that is sent; below, the products cost more than they save
_RIDGE = 1e-6  # times the rectangular identity, is added to P: no column is zero


@dataclass(frozen=True)
class PowerSGDConfig:
    """Compression of the gradients that replicas of the weights exchange.

    The processes of engine "ddp" are replicas, and those of "hybrid" that hold the same shards. There the rank is that
    of each shard: over m processes of a machine it adds up to m times as much. One replica sends nothing, and trains as
    without compression.
    """

    rank: int  # r
    warm_start: bool = True  # False: Q is fixed, as it was for DALL-E

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank: expected 1 or more, got {self.rank}")


def rank_of(rows: int, columns: int, rank: int) -> int:
    """r for a matrix, or 0 where it is sent as it is."""
    rank = min(rank, rows, columns)
    return rank if (rows + columns) * rank * LEAST_RATE < rows * columns else 0


class PowerSGD:
    """What outlives an update, of the parameters that are compressed.

    Attributes:
        errors: e of this replica, fp32, by the parameters' names, in their shapes and shards.
        starts: Q, the same on all replicas, fp32.
    """

    shard = "0 of 1"  # of the parameters, whose Q are here

    def __init__(self, group: ProcessGroup | None, config: PowerSGDConfig, seed: int) -> None:
        self.group, self.rank, self.warm_start, self.seed = group, config.rank, config.warm_start, seed
        self.errors: dict[str, Tensor] = {}
        self.starts: dict[str, Tensor] = {}

    def finish(self) -> None:
        """After a backward pass: leave the replicas' mean in all gradients."""

    def average_errors(self) -> None:
        """Give every replica the mean, before a checkpoint: the run that goes on is then the one that is resumed."""
        for error in self.errors.values():
            _average([_local(error)], self.group)

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint, to write or to fill. Q is found again by as many shards and at the same rank only; else it
        begins anew, which costs one update's accuracy."""
        starts = {f"{name} Q {tuple(q.shape)} {self.shard}": q for name, q in self.starts.items()}
        return {**self.errors, **starts}

    def _compress(self, name: str, parameter: Tensor, rank: int, length: int) -> None:
        """Let a parameter take part, with Q [length, rank]."""
        self.errors[name] = torch.zeros_like(parameter.detach())
        if rank:
            drawn = torch.randn(length, rank, generator=Streams(self.seed, f"Q of {name}").torch(0))
            self.starts[name] = drawn.to(parameter.device)

    def _restart(self, name: str, q: Tensor, finite: Tensor) -> None:
        """Begin the next update with this Q; but its columns of zeros would stay so, and those before are kept."""
        if not self.warm_start:
            return
        start = self.starts[name]
        start.copy_(torch.where(finite & q.any(0), F.normalize(q, dim=0), start))

    def _check(self) -> None:
        if not self.errors:
            raise ValueError(f"power_sgd: expected a rank at which a matrix is compressed, got {self.rank}: none is")


class BucketPowerSGD(PowerSGD):
    """The compression of torch's DistributedDataParallel: torch's own hook, from the first update on.

    torch keeps errors and Q by bucket, and buckets are laid out anew after the first update of every process. So each
    time the hook is given those of a bucket's parameters, and they are taken back from it, but not where gradients were
    not finite. Buckets know no layers: embeddings are compressed, too. On a GPU torch's hook waits for the device.

    Raises:
        ValueError: no parameter is compressed at this rank.
    """

    def __init__(self, module: nn.Module, group: ProcessGroup | None, config: PowerSGDConfig, seed: int) -> None:
        super().__init__(group, config, seed)
        self.state_of_torch = PowerSGDState(
            group, config.rank, start_powerSGD_iter=2, min_compression_rate=LEAST_RATE, orthogonalization_epsilon=1e-8
        )
        self.state_of_torch.iter = 2  # torch asks for as many, for the sake of what it keeps by bucket
        self._names: dict[Tensor, str] = {p: name for name, p in module.named_parameters() if p.requires_grad}
        for parameter, name in self._names.items():
            rows, columns = _sides(parameter)
            if r := rank_of(rows, columns, self.rank):
                self._compress(name, parameter, r, columns)
        self._check()

    def hook(self, state: PowerSGDState, bucket: dist.GradBucket) -> Future[Tensor]:
        """What DistributedDataParallel calls for each bucket, once its gradients are there."""
        index, parameters = bucket.index(), {self._names[p]: p for p in bucket.parameters()}
        errors = {n: _flat(self.errors[n] if n in self.errors else torch.zeros_like(p)) for n, p in parameters.items()}
        state.error_dict[index] = torch.cat([*errors.values()])
        # torch has the matrices of one shape side by side, shapes in the order in which they appear
        shapes = {_sides(p): None for p in parameters.values()}
        names = [n for shape in shapes for n, p in parameters.items() if n in self.starts and _sides(p) == shape]
        starts = [self.starts[name] for name in names]
        state.q_memory_dict[index] = torch.cat([bucket.buffer()[:0], *(q.flatten() for q in starts)])
        rows = sum(len(parameters[name]) * q.shape[1] for name, q in zip(names, starts, strict=True))
        state.p_memory_dict[index] = bucket.buffer().new_empty(rows)

        def keep(done: Future[Tensor]) -> Tensor:
            reduced: Tensor = done.value()
            finite = reduced.isfinite().all()
            left = state.error_dict.pop(index).split([error.numel() for error in errors.values()])
            for error, new in zip(errors.values(), left, strict=True):
                error.copy_(torch.where(finite, new, error))
            right = state.q_memory_dict.pop(index).split([q.numel() for q in starts])
            for name, q, new in zip(names, starts, right, strict=True):
                self._restart(name, new.view_as(q), finite)
            del state.p_memory_dict[index]
            return reduced

        return powerSGD_hook(state, bucket).then(keep)


class ShardPowerSGD(PowerSGD):
    """The compression between replicas of shards: of modules that FSDP2 has sharded over one replica's processes.

    Each shard, [rows, columns], is a matrix of its own, turned so that P has the shorter side; then columns of P are
    orthonormalised by Householder reflections. All that the parameters of an FSDP module send is in two messages, which
    go while the backward pass is still in the modules before. Embeddings, gains and biases are sent as they are.

    Raises:
        ValueError: no parameter is compressed at this rank.
    """

    def __init__(self, module: nn.Module, group: ProcessGroup | None, config: PowerSGDConfig, seed: int) -> None:
        super().__init__(group, config, seed)
        embeddings = {p for layer in module.modules() if isinstance(layer, nn.Embedding) for p in layer.parameters()}
        owners = {p: m for m in module.modules() if isinstance(m, FSDPModule) for p in m.parameters()}  # the innermost
        groups: dict[nn.Module, dict[str, nn.Parameter]] = {}
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            groups.setdefault(owners[parameter], {})[name] = parameter
            if parameter.dim() > 1 and parameter not in embeddings:
                self._compress_shards(name, parameter)
        self._check()
        self._groups = list(groups.values())
        self._hooked = hasattr(FSDPModule, "set_all_reduce_hook")  # from torch 2.7 on
        self._pending = [] if self._hooked else self._groups
        for owner, parameters in groups.items():
            if self._hooked:
                owner.set_all_reduce_hook(partial(self._arrive, parameters))  # type: ignore[operator]

    def _compress_shards(self, name: str, parameter: nn.Parameter) -> None:
        assert isinstance(parameter, DTensor)
        mesh, (rows, columns), mine = parameter.device_mesh, _sides(parameter), len(_local(parameter))
        self.shard = f"{mesh.get_local_rank()} of {mesh.size()}"
        if r := rank_of(math.ceil(rows / mesh.size()), columns, self.rank):  # of the longest shard: all decide alike
            self._compress(name, parameter, min(r, mine), max(mine, columns))

    def finish(self) -> None:
        for parameters in self._pending:
            self._reduce(parameters)
        self._pending = [] if self._hooked else self._groups

    def _arrive(self, parameters: dict[str, nn.Parameter], reduced: Tensor) -> None:
        """FSDP2 is about to make gradients out of `reduced`, the mean over shards. It does not say whose they are, and
        parameters without any are left out; so their turn comes at the next call, when they have been made."""
        self.finish()
        self._pending = [parameters]

    @torch.no_grad()
    def _reduce(self, parameters: dict[str, nn.Parameter]) -> None:
        """Put the replicas' mean, or G, into gradients."""
        gradients = {name: _local(p.grad) for name, p in parameters.items() if p.grad is not None}
        plain = [gradient for name, gradient in gradients.items() if name not in self.errors]
        names = [name for name in gradients if name in self.starts]
        errors = [_matrix(_local(self.errors[name])) for name in names]
        sums = [_matrix(gradients[name]).add_(e) for name, e in zip(names, errors, strict=True)]  # E, in place
        lefts = [e @ self.starts[name] for name, e in zip(names, sums, strict=True)]
        finite = _average([*plain, *lefts], self.group)
        for left in lefts:
            left.masked_fill_(~finite, 0).diagonal().add_(_RIDGE)
        lefts = [torch.linalg.qr(left).Q for left in lefts]
        rights = [e.T @ left for e, left in zip(sums, lefts, strict=True)]
        finite = finite & _average(rights, self.group)
        for name, e, error, left, right in zip(names, sums, errors, lefts, rights, strict=True):
            decompressed = left @ right.T
            error.copy_(torch.where(finite, e - decompressed, error))
            e.copy_(decompressed.masked_fill_(~finite, math.nan))  # the whole update is then skipped
            self._restart(name, right, finite)


def _average(tensors: Sequence[Tensor], group: ProcessGroup | None) -> Tensor:
    """Over the group, in place and in one message; returns whether all of them are finite, bool []."""
    if not tensors:
        return torch.ones((), dtype=torch.bool)
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat, group=group)
    flat /= dist.get_world_size(group)
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))
    return flat.isfinite().all()


def _sides(tensor: Tensor) -> tuple[int, int]:
    """Of the matrix [out, the rest]."""
    return len(tensor), tensor.numel() // max(1, len(tensor))


def _matrix(tensor: Tensor) -> Tensor:
    """[out, the rest], or its transpose where that has fewer rows."""
    matrix = tensor.view(_sides(tensor))
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


def _flat(tensor: Tensor) -> Tensor:
    """In the order of memory, as buckets have it."""
    return tensor.as_strided((tensor.numel(),), (1,))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
