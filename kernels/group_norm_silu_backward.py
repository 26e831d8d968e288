# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# (the arguments of a Triton kernel have no Python type)
"""Gradients of GroupNorm of concat(x, skip) + channel_add with SiLU.

    u = xhat * weight + bias,  grad_u = grad_y * silu'(u)
    grad_weight = sum of grad_u * xhat,  grad_bias = sum of grad_u        over samples and pixels
    grad_v = rstd * (weight*grad_u - mean_group(weight*grad_u) - xhat * mean_group(weight*grad_u*xhat))
    grad_channel_add = sum of grad_v over pixels

xhat is made anew from the inputs and the saved statistics. Three kernels:

    sums         (n, chunk of pixels, block of channels) -> sums of grad_u * xhat, grad_u and xhat of each channel
    groups       (n, group) -> its channels' sums over all chunks, the two means, the gradient of channel_add
    input        (n, chunk, block) -> its part of grad_x or grad_skip

Partial sums are added in a fixed order. Symbols and blocks as in group_norm_silu.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import guard
from .group_norm_silu import SIZES, aligned, configured, empty, load_row, offsets_of, pixels_from, program, span_of
from .group_norm_silu_config import BACKWARD_TILE


@triton.jit
def _normalised(value, grad_y, centre, rstd, weight, bias, SILU: tl.constexpr):
    """(xhat, gradient of u = xhat * weight + bias) of a tile."""
    xhat = (value - centre[None, :]) * rstd[None, :]
    if SILU:
        u = xhat * weight[None, :] + bias[None, :]
        s = tl.sigmoid(u)
        grad_y = grad_y * (s * (1.0 + u * (1.0 - s)))
    return xhat, grad_y


@triton.jit(do_not_specialize=SIZES)
def _grad_sums_kernel(
    grad_y_ptr, x_ptr, skip_ptr, weight_ptr, bias_ptr, add_ptr, mean_ptr, rstd_ptr, sums_ptr,
    size, x_channels, skip_channels, add_stride, tiles, chunks, blocks, samples,
    SILU: tl.constexpr, CHANNELS_LAST: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Sums of grad_u*xhat, grad_u and xhat over the pixels of this chunk: [3, N, K, C]."""
    size, x_channels, skip_channels = aligned(size, x_channels, skip_channels, CHANNELS_LAST, VECTOR)
    n, k, begin, left, block, in_skip = program(size, x_channels, tiles, chunks, 0, blocks, BLOCK_P, BLOCK_C)
    first, last = span_of(block, x_channels, skip_channels, BLOCK_C)
    channel = first + tl.arange(0, BLOCK_C)
    in_block = channel < last

    all_channels = x_channels + skip_channels
    group = n * (all_channels // GROUP) + channel // GROUP
    centre = load_row(mean_ptr, group, in_block)
    rstd = load_row(rstd_ptr, group, in_block)
    weight = load_row(weight_ptr, channel, in_block)
    bias = load_row(bias_ptr, channel, in_block)
    if add_ptr is not None:
        centre -= load_row(add_ptr, n * add_stride + channel, in_block)

    channels = tl.where(in_skip, skip_channels, x_channels)
    local = channel - tl.where(in_skip, x_channels, 0)
    pixel = tl.arange(0, BLOCK_P)
    offsets = offsets_of(pixel, local, channels, size, CHANNELS_LAST)
    y_offsets = offsets_of(pixel, channel, all_channels, size, CHANNELS_LAST)
    source = pixels_from(tl.where(in_skip, skip_ptr, x_ptr), n, begin, channels, size, CHANNELS_LAST)
    y_source = pixels_from(grad_y_ptr, n, begin, all_channels, size, CHANNELS_LAST)
    sum_weight = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    sum_bias = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    sum_xhat = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for tile in range(0, tl.minimum(tiles, tl.cdiv(left, BLOCK_P))):
        valid = (tile * BLOCK_P + pixel < left)[:, None] & in_block[None, :]
        value = tl.load(source + offsets, mask=valid, other=0.0).to(tl.float32)
        grad_y = tl.load(y_source + y_offsets, mask=valid, other=0.0).to(tl.float32)
        xhat, grad_u = _normalised(value, grad_y, centre, rstd, weight, bias, SILU)
        sum_weight += tl.where(valid, grad_u * xhat, 0.0)
        sum_bias += tl.where(valid, grad_u, 0.0)
        if add_ptr is not None:
            sum_xhat += tl.where(valid, xhat, 0.0)
        source += BLOCK_P * (channels if CHANNELS_LAST else 1)
        y_source += BLOCK_P * (all_channels if CHANNELS_LAST else 1)

    at = (n * chunks + k) * all_channels + channel
    plane = samples.to(tl.int64) * chunks * all_channels
    tl.store(sums_ptr + at, tl.sum(sum_weight, 0), mask=in_block)
    tl.store(sums_ptr + plane + at, tl.sum(sum_bias, 0), mask=in_block)
    if add_ptr is not None:
        tl.store(sums_ptr + 2 * plane + at, tl.sum(sum_xhat, 0), mask=in_block)


@triton.jit(do_not_specialize=SIZES)
def _grad_groups_kernel(
    sums_ptr, weight_ptr, rstd_ptr, channel_sums_ptr, group_means_ptr, grad_add_ptr,
    size, all_channels, chunks, samples,
    GROUP: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One group of one sample: its channels' sums over all chunks [2, N, C], the means of weight*grad_u*xhat and
    weight*grad_u over the group [2, N, G], and with those the gradient of channel_add [N, C]."""
    groups = all_channels // GROUP
    n = (tl.program_id(0) // groups).to(tl.int64)
    group = tl.program_id(0) % groups
    member = tl.arange(0, BLOCK_D)
    inside = member < GROUP
    channel = group * GROUP + member

    plane = samples.to(tl.int64) * chunks * all_channels
    sum_weight = tl.zeros([BLOCK_D], tl.float32)
    sum_bias = tl.zeros([BLOCK_D], tl.float32)
    sum_xhat = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, chunks, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        present = (k < chunks)[:, None] & inside[None, :]
        at = (n * chunks + k[:, None]) * all_channels + channel[None, :]
        sum_weight += tl.sum(tl.load(sums_ptr + at, mask=present, other=0.0), 0)
        sum_bias += tl.sum(tl.load(sums_ptr + plane + at, mask=present, other=0.0), 0)
        if grad_add_ptr is not None:
            sum_xhat += tl.sum(tl.load(sums_ptr + 2 * plane + at, mask=present, other=0.0), 0)

    at = n * all_channels + channel
    tl.store(channel_sums_ptr + at, sum_weight, mask=inside)
    tl.store(channel_sums_ptr + samples.to(tl.int64) * all_channels + at, sum_bias, mask=inside)
    weight = load_row(weight_ptr, channel, inside)
    elements = (size.to(tl.int64) * GROUP).to(tl.float32)
    mean_xhat = tl.sum(weight * sum_weight, 0) / elements
    mean_one = tl.sum(weight * sum_bias, 0) / elements
    at_group = n * groups + group
    tl.store(group_means_ptr + at_group, mean_xhat)
    tl.store(group_means_ptr + samples.to(tl.int64) * groups + at_group, mean_one)
    if grad_add_ptr is not None:
        # sum over pixels of the gradient of v, without another pass over them
        grad_add = weight * sum_bias - size.to(tl.float32) * mean_one - sum_xhat * mean_xhat
        tl.store(grad_add_ptr + at, tl.load(rstd_ptr + at_group) * grad_add, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _grad_input_kernel(
    grad_y_ptr, x_ptr, skip_ptr, weight_ptr, bias_ptr, add_ptr, mean_ptr, rstd_ptr, group_means_ptr,
    grad_x_ptr, grad_skip_ptr,
    size, x_channels, skip_channels, add_stride, tiles, chunks, first_block, blocks, samples,
    SILU: tl.constexpr, CHANNELS_LAST: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """grad_v = rstd * (weight*grad_u - mean_group(weight*grad_u) - xhat * mean_group(weight*grad_u*xhat))."""
    size, x_channels, skip_channels = aligned(size, x_channels, skip_channels, CHANNELS_LAST, VECTOR)
    n, _, begin, left, block, in_skip = program(size, x_channels, tiles, chunks, first_block, blocks, BLOCK_P, BLOCK_C)
    first, last = span_of(block, x_channels, skip_channels, BLOCK_C)
    channel = first + tl.arange(0, BLOCK_C)
    in_block = channel < last

    all_channels = x_channels + skip_channels
    groups = all_channels // GROUP
    group = n * groups + channel // GROUP
    centre = load_row(mean_ptr, group, in_block)
    rstd = load_row(rstd_ptr, group, in_block)
    mean_xhat = load_row(group_means_ptr, group, in_block)
    mean_one = load_row(group_means_ptr, samples.to(tl.int64) * groups + group, in_block)
    weight = load_row(weight_ptr, channel, in_block)
    bias = load_row(bias_ptr, channel, in_block)
    if add_ptr is not None:
        centre -= load_row(add_ptr, n * add_stride + channel, in_block)

    channels = tl.where(in_skip, skip_channels, x_channels)
    local = channel - tl.where(in_skip, x_channels, 0)
    pixel = tl.arange(0, BLOCK_P)
    offsets = offsets_of(pixel, local, channels, size, CHANNELS_LAST)
    y_offsets = offsets_of(pixel, channel, all_channels, size, CHANNELS_LAST)
    source = pixels_from(tl.where(in_skip, skip_ptr, x_ptr), n, begin, channels, size, CHANNELS_LAST)
    target = pixels_from(tl.where(in_skip, grad_skip_ptr, grad_x_ptr), n, begin, channels, size, CHANNELS_LAST)
    y_source = pixels_from(grad_y_ptr, n, begin, all_channels, size, CHANNELS_LAST)
    for tile in range(0, tl.minimum(tiles, tl.cdiv(left, BLOCK_P))):
        valid = (tile * BLOCK_P + pixel < left)[:, None] & in_block[None, :]
        value = tl.load(source + offsets, mask=valid, other=0.0).to(tl.float32)
        grad_y = tl.load(y_source + y_offsets, mask=valid, other=0.0).to(tl.float32)
        xhat, grad_u = _normalised(value, grad_y, centre, rstd, weight, bias, SILU)
        grad = rstd[None, :] * (weight[None, :] * grad_u - mean_one[None, :] - xhat * mean_xhat[None, :])
        tl.store(target + offsets, grad.to(grad_x_ptr.dtype.element_ty), mask=valid)
        source += BLOCK_P * (channels if CHANNELS_LAST else 1)
        target += BLOCK_P * (channels if CHANNELS_LAST else 1)
        y_source += BLOCK_P * (all_channels if CHANNELS_LAST else 1)


def backward(
    grad_y: Tensor,  # [N, C, *spatial], in the layout of x
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    channel_add: Tensor | None,
    statistics: Tensor,  # fp32 [2 * N * G]: mean, then rstd
    num_groups: int,
    silu: bool,
    channels_last: bool,
    needs: tuple[bool, bool, bool, bool, bool],  # x, skip, weight, bias, channel_add
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x and skip in their dtype, of weight, bias [C] and channel_add [N, C] in fp32; None where one is
    not needed or its input absent."""
    config, size, x_channels, skip_channels = configured(x, skip, grad_y, num_groups, channels_last, BACKWARD_TILE)
    samples, channels = x.shape[0], x_channels + skip_channels
    group_size = channels // num_groups
    need_x, need_skip, need_weight, need_bias, need_add = needs
    need_skip, need_add = need_skip and skip is not None, need_add and channel_add is not None
    if not (need_x or need_skip or need_weight or need_bias or need_add):
        return None, None, None, None, None

    sums = x.new_empty(3, samples, config.chunks, channels, dtype=torch.float32)
    channel_sums = x.new_empty(2, samples, channels, dtype=torch.float32)
    group_means = x.new_empty(2, samples, num_groups, dtype=torch.float32)
    grad_add = x.new_empty(samples, channels, dtype=torch.float32) if need_add else None
    mean, rstd = statistics.chunk(2)
    inputs = (grad_y, x, x if skip is None else skip, weight, bias, channel_add, mean, rstd)
    add_stride = 0 if channel_add is None else channel_add.stride(0)
    sizes = (size, x_channels, skip_channels, add_stride, config.tiles, config.chunks)
    tile = {
        "SILU": silu, "CHANNELS_LAST": channels_last, "GROUP": group_size,
        "BLOCK_P": config.block_p, "BLOCK_C": config.block_c, "VECTOR": config.vector,
        "num_warps": config.num_warps,
    }  # fmt: skip
    block_d = triton.next_power_of_2(group_size)
    with guard(x):
        _grad_sums_kernel[(config.programs(samples),)](*inputs, sums, *sizes, config.blocks, samples, **tile)
        _grad_groups_kernel[(samples * num_groups,)](
            sums, weight, rstd, channel_sums, group_means, grad_add, size, channels, config.chunks, samples,
            GROUP=group_size, BLOCK_D=block_d, BLOCK_K=max(1, 1024 // block_d), num_warps=4,
        )  # fmt: skip
        grad_x = empty(x, x_channels, channels_last) if need_x else None
        grad_skip = empty(x, skip_channels, channels_last) if need_skip else None
        if need_x or need_skip:
            # blocks of x come first, then those of skip: leave out whichever is not needed
            x_blocks = -(-x_channels // config.block_c)
            first_block = 0 if need_x else x_blocks
            blocks = (config.blocks if need_skip else x_blocks) - first_block
            targets = (grad_x if need_x else grad_skip, grad_skip if need_skip else grad_x)
            _grad_input_kernel[(samples * config.chunks * blocks,)](
                *inputs, group_means, *targets, *sizes, first_block, blocks, samples, **tile
            )
    grad_weight, grad_bias = channel_sums.sum(1) if need_weight or need_bias else (None, None)
    return grad_x, grad_skip, grad_weight if need_weight else None, grad_bias if need_bias else None, grad_add
