"""The processes of one training: one by default, several under torchrun, on PyTorch's own DDP or FSDP2."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from kolors_fast.evaluation.statistics import gather_over_workers
from kolors_fast.models import dit_layers, mmdit_blocks, unet_blocks
from kolors_fast.models.attention import Attention
from kolors_fast.models.layers import store_convolutions
from kolors_fast.pipelines.prompts_file import Worker

from .objectives import Objective
from .power_sgd import BucketPowerSGD, PowerSGD, PowerSGDConfig, ShardPowerSGD

T = TypeVar("T")

ENGINES = ("ddp", "fsdp", "hybrid")
# the largest layers that are called as a whole: whoever needs their weights is in them. What models read of blocks from
# outside (modulations of all blocks at once, time shifts) stays with the root
SHARDED = (Attention, mmdit_blocks.Attention, unet_blocks.FeedForward, dit_layers.FeedForward)
METHODS = ("keys_values", "encode", "decode")  # that are called like forward


@dataclass(frozen=True)
class World:
    """This process among those that train together: a batch is split among them, gradients are averaged.

    Attributes:
        device: of the weights, and of all that is computed with them.
        engine: "ddp": each holds all weights. "fsdp": weights, gradients and moments are sharded over all processes.
            "hybrid": over those of a machine, and the machines hold copies.
    """

    rank: int = 0
    size: int = 1
    engine: str = "ddp"
    device: torch.device = torch.device("cpu")  # noqa: RUF009, it is immutable

    @classmethod
    def join(cls, engine: str = "ddp", device: str | None = None) -> World:
        """The world torchrun has set up in the environment, or a process on its own.

        Args:
            device: None: this process's GPU, where torch sees any, else the CPU.

        Raises:
            ValueError: there is no such engine, or no such device.
        """
        if engine not in ENGINES:
            raise ValueError(f"engine: expected one of {', '.join(ENGINES)}, got '{engine}'")
        worker, seen = Worker.from_environment(), torch.cuda.is_available()
        chosen = torch.device(worker.device(device) or ("cuda" if seen else "cpu"))
        if chosen.type == "cuda" and not seen:
            raise ValueError(f"device: expected cpu, for torch sees no CUDA device, got '{device}'")
        if worker.count == 1:
            return cls(device=chosen)
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
            store, rank, size = next(dist.rendezvous("env://"))
            dist.init_process_group(backend, store=_of_this_start(store), rank=rank, world_size=size)
        return cls(dist.get_rank(), dist.get_world_size(), engine, chosen)

    def leave(self) -> None:
        """After the last message: the group's threads may abort a process that ends with them."""
        if self.size > 1:
            dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        return self.size > 1 and self.engine != "ddp"

    @property
    def replicas(self) -> int:
        """Of every weight."""
        if self.engine == "hybrid":
            return self.size // int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        return self.size if self.engine == "ddp" else 1

    def wait(self) -> None:
        """Return when every process is here."""
        if self.size > 1:
            dist.barrier()

    def any(self, flag: bool) -> bool:
        """Whether it is so in some process; asked on the CPU, so that no device is waited for."""
        if self.size == 1:
            return flag
        told = torch.tensor(float(flag))
        dist.all_reduce(told, dist.ReduceOp.MAX)
        return bool(told)

    def mean(self, value: Tensor) -> Tensor:
        """Over the processes."""
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
            value /= self.size
        return value

    def gather_objects(self, value: T) -> list[T]:
        """Of all processes, in order of rank."""
        return gather_over_workers(value) if self.size > 1 else [value]

    def broadcast_object(self, value: T) -> T:
        """The main process's."""
        if self.size == 1:
            return value
        told = [value]
        dist.broadcast_object_list(told, src=0)
        return told[0]

    # ---- engines

    def shard(self, module: nn.Module, *, replicate: bool = True) -> None:
        """Let each process keep its part of every parameter, with FSDP2; nothing where the engine is "ddp".

        Args:
            replicate: average gradients between the machines of "hybrid", too; else `compress` does.
        """
        if not self.sharded:
            return
        # a linear layer's output may be a view; no model writes into what a sharded layer returned
        warnings.filterwarnings("ignore", message=".* returned a view tensor")
        mesh = self._mesh() if replicate else self._mesh()["shard"]
        store_convolutions(module, torch.contiguous_format)  # the only layout that is sharded
        for layer in [layer for layer in module.modules() if isinstance(layer, SHARDED)]:
            fully_shard(layer, mesh=mesh)
            _register_methods(layer)
        fully_shard(module, mesh=mesh)
        _register_methods(module)

    def _mesh(self) -> DeviceMesh:
        if self.engine == "fsdp":
            return init_device_mesh(self.device.type, (self.size,))
        shape = (self.replicas, self.size // self.replicas)
        return init_device_mesh(self.device.type, shape, mesh_dim_names=("replicate", "shard"))

    def compresses(self, config: PowerSGDConfig | None) -> bool:
        """Whether gradients are to be compressed: so asked, and there are replicas that exchange them.

        Raises:
            ValueError: the engine has none, of however many processes.
        """
        if config is None or self.size == 1:
            return False
        if self.engine == "fsdp":
            raise ValueError("engine: expected ddp or hybrid with power_sgd, got fsdp, which has no replicas")
        return self.replicas > 1

    def compress(self, module: nn.Module, config: PowerSGDConfig | None, *, seed: int) -> PowerSGD | None:
        """The compression, if there is to be one, of the gradients of a module that `shard` has been given.

        Raises:
            ValueError: as `compresses`, or no parameter is compressed at this rank.
        """
        if config is None or not self.compresses(config):
            return None
        if self.engine == "hybrid":
            return ShardPowerSGD(module, self._mesh().get_group("replicate"), config, seed)
        return BucketPowerSGD(module, None, config, seed)

    def losses(self, objective: Objective, compression: PowerSGD | None = None) -> Callable[[int], Tensor]:
        """step -> this process's loss, whose backward pass leaves the mean gradient of all processes; with compression,
        once its `finish` is called."""
        if self.size == 1 or self.sharded:
            return objective.loss
        # the dead query projection of an MM-DiT's last block gets no gradient in any step; and gradients lie where they
        # are reduced, or there would be two of each
        parallel = DistributedDataParallel(_Losses(objective), static_graph=True, gradient_as_bucket_view=True)
        if isinstance(compression, BucketPowerSGD):
            parallel.register_comm_hook(compression.state_of_torch, compression.hook)
        return parallel

    def norm(self, squares: Tensor) -> Tensor:
        """sqrt of the sum of squares over the shards of all processes."""
        if self.sharded:
            squares = squares.clone()
            dist.all_reduce(squares)
            squares /= self.replicas
        return squares.sqrt()


class _Losses(nn.Module):
    """An objective's losses as what DDP wraps, for objectives call more of their module than its forward."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.module, self.objective = objective.module, objective

    def forward(self, step: int) -> Tensor:
        return self.objective.loss(step)


def _of_this_start(store: dist.Store) -> dist.Store:
    """The store without what workers that torchrun has restarted since left in it: their addresses, where nobody is.

    torchrun's store outlives its workers. It counts their starts, and that count is the same for all where one
    torchrun has started them all.
    """
    count, everybody = os.environ.get("TORCHELASTIC_RESTART_COUNT"), os.environ["WORLD_SIZE"]
    if count is None or os.environ.get("LOCAL_WORLD_SIZE") != everybody:
        return store
    return dist.PrefixStore(f"start {count}", store)


def _register_methods(module: nn.Module) -> None:
    for name in METHODS:
        if hasattr(module, name):
            register_fsdp_forward_method(module, name)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, or the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def locals_of(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [local(tensor) for tensor in tensors]


@torch.no_grad()
def gather_into(target: nn.Module | None, module: nn.Module) -> None:
    """Copy a sharded module's parameters and buffers to `target` on the main process, which alone has one."""
    whole = dict(target.state_dict()) if target is not None else {}
    for name, value in module.state_dict().items():
        full = value.full_tensor() if isinstance(value, DTensor) else value  # all processes take part
        if target is not None:
            whole[name].copy_(full)
