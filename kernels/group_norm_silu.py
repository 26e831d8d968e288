# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# (the arguments of a Triton kernel have no Python type)
"""GroupNorm of concat(x, skip) + channel_add, then SiLU or nothing, without building the concat.

    v    = concat(x, skip) + channel_add                 [N, C, S], C = Cx + Cskip, S pixels
    xhat = (v - mean_group(v)) * rstd_group(v)
    y    = silu(xhat * weight + bias)

A tile is BLOCK_P pixels of BLOCK_C neighbouring channels, whatever the groups are: no lane is lost on 10 or 30
channels per group. A block of channels never crosses the seam between x and skip, so a program reads one
pointer; groups cross blocks and the seam freely:

    statistics   (n, chunk of pixels, block of channels) -> count, mean, M2 of each group's part in the block
    apply        merges the parts of its groups in fixed order, then normalises its chunk

Variances come from deviations (Welford per lane, relative to a pixel of the data, then Chan et al.'s merge,
"Updating formulae and a pairwise algorithm for computing sample variances", 1979), never from E[x^2] - E[x]^2.
Everything is fp32 and rounded once at the store. No atomics: the same input gives the same bits.

Symbols: N samples, S pixels, C channels, D channels per group, G groups, K chunks, B blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import guard, multiprocessors
from .group_norm_silu_config import FORWARD_TILE, Config, configure

# every integer is a plain run-time argument: neither a 1 nor a multiple of 16 makes another variant.
# What the compiler may rely on is said by VECTOR, and by the alignment of the pointers
SIZES = ["size", "x_channels", "skip_channels", "all_channels", "add_stride", "tiles", "chunks"]
SIZES += ["first_block", "blocks", "samples"]


@triton.jit
def aligned(size, x_channels, skip_channels, CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr):
    """The same values, but now the compiler knows the contiguous lengths to be multiples of VECTOR."""
    if CHANNELS_LAST:
        return size, x_channels // VECTOR * VECTOR, skip_channels // VECTOR * VECTOR
    else:
        return size // VECTOR * VECTOR, x_channels, skip_channels


@triton.jit
def program(
    size, x_channels, tiles, chunks, first_block, blocks, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """(sample, chunk, its first pixel, pixels from there on, block, whether that lies in skip) of this program."""
    block = first_block + tl.program_id(0) % blocks
    rest = tl.program_id(0) // blocks
    begin = rest % chunks * (tiles * BLOCK_P)
    in_skip = block >= tl.cdiv(x_channels, BLOCK_C)
    return (rest // chunks).to(tl.int64), rest % chunks, begin, size - begin, block, in_skip


@triton.jit
def span_of(block, x_channels, skip_channels, BLOCK_C: tl.constexpr):
    """Channels [begin, end) of a block, or of a tensor of blocks. Mirrors block_spans."""
    in_skip = block >= tl.cdiv(x_channels, BLOCK_C)
    begin = tl.where(in_skip, x_channels + (block - tl.cdiv(x_channels, BLOCK_C)) * BLOCK_C, block * BLOCK_C)
    return begin, tl.minimum(begin + BLOCK_C, x_channels + tl.where(in_skip, skip_channels, 0))


@triton.jit
def _block_of(channel, x_channels, BLOCK_C: tl.constexpr):
    skip_block = tl.cdiv(x_channels, BLOCK_C) + (channel - x_channels) // BLOCK_C
    return tl.where(channel < x_channels, channel // BLOCK_C, skip_block)


@triton.jit
def offsets_of(pixel, channel, channels, size, CHANNELS_LAST: tl.constexpr):
    """Offsets [BLOCK_P, BLOCK_C] inside one sample of a tensor of so many channels."""
    if CHANNELS_LAST:
        return pixel[:, None] * channels + channel[None, :]
    else:
        return channel[None, :].to(tl.int64) * size + pixel[:, None]


@triton.jit
def pixels_from(ptr, n, begin, channels, size, CHANNELS_LAST: tl.constexpr):
    """Pointer to pixel `begin` of sample n of a tensor of so many channels."""
    return ptr + n * channels * size + begin.to(tl.int64) * (channels if CHANNELS_LAST else 1)


@triton.jit
def load_row(ptr, at, mask):
    return tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=SIZES)
def _statistics_kernel(
    x_ptr, skip_ptr, add_ptr, mean_ptr, m2_ptr,
    size, x_channels, skip_channels, add_stride, tiles, chunks, blocks,
    CHANNELS_LAST: tl.constexpr, GROUP: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """mean, M2 [N, B, SLOTS, K] of the part of each group that lies in this block and chunk."""
    size, x_channels, skip_channels = aligned(size, x_channels, skip_channels, CHANNELS_LAST, VECTOR)
    n, k, begin, left, block, in_skip = program(size, x_channels, tiles, chunks, 0, blocks, BLOCK_P, BLOCK_C)
    first, last = span_of(block, x_channels, skip_channels, BLOCK_C)
    channel = first + tl.arange(0, BLOCK_C)
    in_block = channel < last

    channels = tl.where(in_skip, skip_channels, x_channels)
    local = channel - tl.where(in_skip, x_channels, 0)
    pixel = tl.arange(0, BLOCK_P)
    offsets = offsets_of(pixel, local, channels, size, CHANNELS_LAST)
    source = pixels_from(tl.where(in_skip, skip_ptr, x_ptr), n, begin, channels, size, CHANNELS_LAST)

    # relative to the chunk's first pixel a large mean costs no precision, and channel_add cancels
    pivot = load_row(source, local.to(tl.int64) * (1 if CHANNELS_LAST else size), in_block)
    mean = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for tile in range(0, tl.minimum(tiles, tl.cdiv(left, BLOCK_P))):
        valid = (tile * BLOCK_P + pixel < left)[:, None] & in_block[None, :]
        value = tl.load(source + offsets, mask=valid, other=0.0).to(tl.float32) - pivot[None, :]
        delta = tl.where(valid, value - mean, 0.0)
        mean += delta * (1.0 / (tile + 1.0))
        m2 += delta * (value - mean)
        source += BLOCK_P * (channels if CHANNELS_LAST else 1)

    # lanes to channels: lane p has seen every BLOCK_P-th pixel from p on
    count = tl.minimum(left, tiles * BLOCK_P).to(tl.float32)
    seen = tl.minimum(tiles, tl.maximum(tl.cdiv(left - pixel, BLOCK_P), 0)).to(tl.float32)[:, None]
    channel_mean = tl.sum(seen * mean, 0) / count
    deviation = mean - channel_mean[None, :]
    channel_m2 = tl.sum(tl.where(seen > 0, m2 + seen * deviation * deviation, 0.0), 0)
    # where the pivot outweighs the mean, what rounding took from the first sum is still in the deviations
    channel_mean = (pivot + channel_mean) + tl.sum(seen * deviation, 0) / count
    if add_ptr is not None:
        channel_mean += load_row(add_ptr, n * add_stride + channel, in_block)

    # channels to the groups of this block, relative to the first channel of each
    group = first // GROUP + tl.arange(0, SLOTS)
    member = (group[:, None] == (channel // GROUP)[None, :]) & in_block[None, :]
    members = tl.sum(member.to(tl.float32), 1)
    leader = channel[None, :] == tl.maximum(group * GROUP, first)[:, None]
    leading = tl.sum(tl.where(member & leader, channel_mean[None, :], 0.0), 1)
    distance = tl.where(member, channel_mean[None, :] - leading[:, None], 0.0)
    shift = tl.sum(distance, 1) / tl.maximum(members, 1.0)
    deviation = distance - shift[:, None]
    group_m2 = tl.sum(tl.where(member, channel_m2[None, :] + count * deviation * deviation, 0.0), 1)

    at = ((n * blocks + block) * SLOTS + tl.arange(0, SLOTS)) * chunks + k
    tl.store(mean_ptr + at, leading + shift)
    tl.store(m2_ptr + at, group_m2)


@triton.jit
def _merged(
    mean_ptr, m2_ptr, n, group, size, x_channels, skip_channels, chunk, chunks, blocks, eps,
    GROUP: tl.constexpr, SLOTS: tl.constexpr, PARTS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(mean, rstd) [SLOTS] of these groups: their parts in all blocks and chunks, in fixed order."""
    exists = group * GROUP < x_channels + skip_channels
    first_block = _block_of(group * GROUP, x_channels, BLOCK_C)
    last_block = _block_of(group * GROUP + GROUP - 1, x_channels, BLOCK_C)

    begin, _ = span_of(first_block, x_channels, skip_channels, BLOCK_C)
    slot = group - begin // GROUP
    mean = tl.load(mean_ptr + ((n * blocks + first_block) * SLOTS + slot) * chunks, mask=exists, other=0.0)
    m2 = tl.zeros([SLOTS], tl.float32)
    count = tl.zeros([SLOTS], tl.float32)
    for start in range(0, chunks * PARTS, BLOCK_K):
        entry = (start + tl.arange(0, BLOCK_K))[:, None]
        k = entry // PARTS
        block = first_block[None, :] + entry % PARTS
        present = (k < chunks) & (block <= last_block[None, :]) & exists[None, :]
        first, last = span_of(block, x_channels, skip_channels, BLOCK_C)
        channels = tl.minimum(last, (group * GROUP + GROUP)[None, :]) - tl.maximum(first, (group * GROUP)[None, :])
        weight = tl.where(present, channels * tl.minimum(chunk, size - k * chunk), 0).to(tl.float32)
        at = ((n * blocks + block) * SLOTS + group[None, :] - first // GROUP) * chunks + k
        distance = tl.load(mean_ptr + at, mask=present, other=0.0) - mean[None, :]
        part_m2 = tl.load(m2_ptr + at, mask=present, other=0.0)

        weights = tl.sum(weight, 0)
        shift = tl.sum(tl.where(present, weight * distance, 0.0), 0) / tl.maximum(weights, 1.0)
        deviation = distance - shift[None, :]
        total = tl.maximum(count + weights, 1.0)
        m2 += tl.sum(tl.where(present, part_m2 + weight * deviation * deviation, 0.0), 0)
        m2 += shift * shift * (count * weights / total)
        mean += shift * (weights / total)
        count = total
    variance = m2 / tl.maximum(count, 1.0)
    return mean, tl.math.div_rn(1.0, tl.sqrt_rn(variance + tl.cast(eps, tl.float32)))


@triton.jit(do_not_specialize=SIZES)
def _apply_kernel(
    x_ptr, skip_ptr, weight_ptr, bias_ptr, add_ptr, part_mean_ptr, part_m2_ptr, y_ptr, mean_ptr, rstd_ptr,
    size, x_channels, skip_channels, add_stride, tiles, chunks, blocks, eps,
    SILU: tl.constexpr, CHANNELS_LAST: tl.constexpr, GROUP: tl.constexpr, SLOTS: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """y of one chunk and block; the programs of the first chunk also write mean and rstd [N, G]."""
    size, x_channels, skip_channels = aligned(size, x_channels, skip_channels, CHANNELS_LAST, VECTOR)
    n, k, begin, left, block, in_skip = program(size, x_channels, tiles, chunks, 0, blocks, BLOCK_P, BLOCK_C)
    first, last = span_of(block, x_channels, skip_channels, BLOCK_C)
    channel = first + tl.arange(0, BLOCK_C)
    in_block = channel < last

    group = first // GROUP + tl.arange(0, SLOTS)
    mean, rstd = _merged(
        part_mean_ptr, part_m2_ptr, n, group, size, x_channels, skip_channels, tiles * BLOCK_P, chunks, blocks, eps,
        GROUP, SLOTS, PARTS, BLOCK_C, BLOCK_K,
    )  # fmt: skip
    if k == 0:
        # a group that crosses blocks is written by the block where it begins
        owned = (group * GROUP >= first) & (group * GROUP < last)
        at = n * ((x_channels + skip_channels) // GROUP) + group
        tl.store(mean_ptr + at, mean, mask=owned)
        tl.store(rstd_ptr + at, rstd, mask=owned)

    member = group[:, None] == (channel // GROUP)[None, :]
    centre = tl.sum(tl.where(member, mean[:, None], 0.0), 0)
    scale = tl.sum(tl.where(member, rstd[:, None], 0.0), 0)
    scale *= load_row(weight_ptr, channel, in_block)
    bias = load_row(bias_ptr, channel, in_block)
    if add_ptr is not None:
        centre -= load_row(add_ptr, n * add_stride + channel, in_block)

    channels = tl.where(in_skip, skip_channels, x_channels)
    local = channel - tl.where(in_skip, x_channels, 0)
    pixel = tl.arange(0, BLOCK_P)
    all_channels = x_channels + skip_channels
    source_offsets = offsets_of(pixel, local, channels, size, CHANNELS_LAST)
    target_offsets = offsets_of(pixel, channel, all_channels, size, CHANNELS_LAST)
    source = pixels_from(tl.where(in_skip, skip_ptr, x_ptr), n, begin, channels, size, CHANNELS_LAST)
    target = pixels_from(y_ptr, n, begin, all_channels, size, CHANNELS_LAST)
    for tile in range(0, tl.minimum(tiles, tl.cdiv(left, BLOCK_P))):
        valid = (tile * BLOCK_P + pixel < left)[:, None] & in_block[None, :]
        value = tl.load(source + source_offsets, mask=valid, other=0.0).to(tl.float32)
        # subtract the mean before scaling: folding it into the bias would cancel
        y = (value - centre[None, :]) * scale[None, :] + bias[None, :]
        if SILU:
            y = y * tl.sigmoid(y)
        tl.store(target + target_offsets, y.to(y_ptr.dtype.element_ty), mask=valid)
        source += BLOCK_P * (channels if CHANNELS_LAST else 1)
        target += BLOCK_P * (all_channels if CHANNELS_LAST else 1)


def empty(like: Tensor, channels: int, channels_last: bool) -> Tensor:
    """[N, channels, *spatial] in the layout, dtype and device of `like`."""
    samples, _, *spatial = like.shape
    if not channels_last:
        return like.new_empty(samples, channels, *spatial)
    return like.new_empty(samples, *spatial, channels).movedim(-1, 1)


def configured(
    x: Tensor, skip: Tensor | None, grad_y: Tensor | None, num_groups: int, channels_last: bool, tile: int
) -> tuple[Config, int, int, int]:
    """(config, size, x_channels, skip_channels)"""
    samples, x_channels = x.shape[:2]
    skip_channels = 0 if skip is None else skip.shape[1]
    size = x.numel() // (samples * x_channels)
    aligned = all(t is None or t.data_ptr() % 16 == 0 for t in (x, skip, grad_y))
    config = configure(
        samples, x_channels, skip_channels, size, num_groups, x.element_size(), channels_last, aligned,
        multiprocessors(x.device), tile,
    )  # fmt: skip
    return config, size, x_channels, skip_channels


def forward(
    x: Tensor,  # [N, Cx, *spatial], contiguous or channels_last
    skip: Tensor | None,  # [N, Cskip, *spatial], in the same layout and dtype
    weight: Tensor,  # [C], in the dtype of x or fp32
    bias: Tensor,  # [C]
    channel_add: Tensor | None,  # [N, C], the last axis contiguous
    num_groups: int,
    eps: float,
    silu: bool,
    channels_last: bool,
) -> tuple[Tensor, Tensor]:
    """(y [N, C, *spatial] like x, statistics fp32 [2 * N * G]): the mean, then the rstd of every group of
    x + channel_add."""
    config, size, x_channels, skip_channels = configured(x, skip, None, num_groups, channels_last, FORWARD_TILE)
    samples, channels = x.shape[0], x_channels + skip_channels
    y = empty(x, channels, channels_last)
    statistics = x.new_empty(2 * samples * num_groups, dtype=torch.float32)
    part_mean, part_m2 = x.new_empty(2, samples * config.blocks * config.slots * config.chunks, dtype=torch.float32)
    # without a skip no block lies in it, and its pointer is never followed
    sources = (x, x if skip is None else skip)
    add_stride = 0 if channel_add is None else channel_add.stride(0)
    sizes = (size, x_channels, skip_channels, add_stride, config.tiles, config.chunks, config.blocks)
    tile = {
        "CHANNELS_LAST": channels_last, "GROUP": channels // num_groups, "SLOTS": config.slots,
        "BLOCK_P": config.block_p, "BLOCK_C": config.block_c, "VECTOR": config.vector,
        "num_warps": config.num_warps,
    }  # fmt: skip
    grid = (config.programs(samples),)
    with guard(x):
        _statistics_kernel[grid](*sources, channel_add, part_mean, part_m2, *sizes, **tile)
        _apply_kernel[grid](
            *sources, weight, bias, channel_add, part_mean, part_m2, y, *statistics.chunk(2), *sizes, eps,
            SILU=silu, PARTS=config.parts, BLOCK_K=max(16, 1024 // config.slots), **tile,
        )  # fmt: skip
    return y, statistics
