# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# (the arguments of a Triton kernel have no Python type)
"""Joint attention of one or two streams, with RMSNorm on queries and keys, without building a concat.

    qn  = q * rsqrt(mean(q^2) + eps) * q_weight          per stream, rounded to the dtype of q; likewise kn
    out = softmax(scale * qn @ kn^T + key_bias) @ v      over the keys of both streams

A program holds a block of queries of one stream and walks over the keys of the first stream, then of the second, with
a running maximum and sum (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; Dao,
"FlashAttention-2", 2023). Only the last tile of a stream is masked. The softmax is fp32, its exponentials are powers of
two. With a few keys K and V stay on chip instead, as one tile, while the program walks over blocks of queries.

Queries are normalised where they are loaded. Keys are normalised once, into a scratch of their stream's size: inside
the loop every block of queries would do it again (32 times in a picture of 64x64 tokens) and push K through registers,
where tensor cores read it from shared memory. Folding the weights into q and 1/rms into the logits needs no scratch,
but one more multiplication per logit, and in the backward pass it puts 1/rms into dS, which then leaves the range of
fp16 when k is large or small.

A head is cut into its largest power of two and a tail: 72 is 64 + 16 columns, 8 of them empty, and not 128.

Symbols: B samples, H heads, D head dim, L and L2 queries of the streams, S and S2 keys.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import architecture, guard, multiprocessors
from .qk_norm_attention_config import Config, configure, few_keys_chunk, few_keys_tile

LOG2_E = tl.constexpr(1.4426950408889634)

# every integer is a plain run-time argument: neither a 1 nor a multiple of 16 makes another variant.
# What the compiler may rely on is said by VECTOR, and by the alignment of the pointers
SIZES = ["samples", "heads", "queries", "added_queries", "keys", "added_keys", "rows", "blocks"]
SIZES += [
    f"{tensor}_{axis}"
    for tensor in ("x", "q", "k", "v", "added_q", "added_k", "added_v")
    for axis in ("batch", "row", "head")
]


@triton.jit
def aligned(stride, VECTOR: tl.constexpr):
    """The same value in 64 bits, and now the compiler knows it to be a multiple of VECTOR."""
    return (stride // VECTOR * VECTOR).to(tl.int64)


@triton.jit
def head_of(ptr, b, h, batch_stride, head_stride, VECTOR: tl.constexpr):
    """Where sample b's head h begins."""
    return ptr + (b * aligned(batch_stride, VECTOR) + h * aligned(head_stride, VECTOR))


@triton.jit
def _columns(
    ptr, row, stride, left,
    FIRST: tl.constexpr, COLUMNS: tl.constexpr, HEAD: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Columns from FIRST on of these rows; zeros from column HEAD and, at an EDGE, from row `left` on."""
    column = FIRST + tl.arange(0, COLUMNS)
    source = ptr + (row[:, None] * stride + column[None, :])
    if FIRST + COLUMNS > HEAD:
        inside = (column < HEAD)[None, :]
        if EDGE:
            inside &= (row < left)[:, None]
        return tl.load(source, mask=inside, other=0.0)
    elif EDGE:
        return tl.load(source, mask=(row < left)[:, None], other=0.0)
    else:
        return tl.load(source)


@triton.jit
def load_rows(
    ptr, row, stride, left,
    HEAD: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Rows of one head as ([rows, MAIN], [rows, TAIL]); without a tail the second is the first again, for nobody."""
    main = _columns(ptr, row, stride, left, 0, MAIN, HEAD, EDGE)
    tail = main
    if TAIL > 0:
        tail = _columns(ptr, row, stride, left, MAIN, TAIL, HEAD, EDGE)
    return main, tail


@triton.jit
def store_rows(
    ptr, row, stride, left, main, tail, HEAD: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr
):  # fmt: skip
    """The converse of load_rows, rounded to the dtype of ptr."""
    dtype = ptr.dtype.element_ty
    target = ptr + row[:, None] * stride
    column = tl.arange(0, MAIN)
    inside = (row < left)[:, None]
    if MAIN > HEAD:
        inside &= (column < HEAD)[None, :]
    tl.store(target + column[None, :], main.to(dtype), mask=inside)
    if TAIL > 0:
        column = MAIN + tl.arange(0, TAIL)
        tl.store(target + column[None, :], tail.to(dtype), mask=(row < left)[:, None] & (column < HEAD)[None, :])


@triton.jit
def dot(a, a_tail, b, b_tail, TAIL: tl.constexpr):
    """a @ b over the columns of a head, rows of a and columns of b; fp32 stays fp32."""
    product = tl.dot(a, b, input_precision="ieee")
    if TAIL > 0:
        product = tl.dot(a_tail, b_tail, product, input_precision="ieee")
    return product


@triton.jit
def rstd_of(x, x_tail, eps, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """1 / rms of each row of fp32 tiles."""
    squares = tl.sum(x * x, 1)
    if TAIL > 0:
        squares += tl.sum(x_tail * x_tail, 1)
    return tl.rsqrt(squares * (1.0 / HEAD) + eps)


@triton.jit
def _load_weight(
    ptr, added_ptr, in_added, FIRST: tl.constexpr, COLUMNS: tl.constexpr, HEAD: tl.constexpr
):  # fmt: skip
    column = FIRST + tl.arange(0, COLUMNS)
    inside = column < HEAD
    if ptr is None:
        weight = tl.load(added_ptr + column, mask=inside, other=0.0).to(tl.float32)
    else:
        weight = tl.load(ptr + column, mask=inside, other=0.0).to(tl.float32)
        if added_ptr is not None:
            added_weight = tl.load(added_ptr + column, mask=inside, other=0.0).to(tl.float32)
            weight = tl.where(in_added, added_weight, weight)
    return weight


@triton.jit
def load_weights(
    ptr, added_ptr, in_added, HEAD: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr
):  # fmt: skip
    """Weights of the stream, in fp32, as load_rows cuts them; at least one stream has some."""
    main = _load_weight(ptr, added_ptr, in_added, 0, MAIN, HEAD)
    tail = main
    if TAIL > 0:
        tail = _load_weight(ptr, added_ptr, in_added, MAIN, TAIL, HEAD)
    return main, tail


@triton.jit
def normalised_or(other, x, ptr, added_ptr, in_added):
    """x, or `other` for the rows of a stream that has no weight."""
    if ptr is None:
        x = tl.where(in_added, x, other)
    elif added_ptr is None:
        x = tl.where(in_added, other, x)
    return x


@triton.jit
def _load_queries(
    ptr, row, stride, left, weight_ptr, added_weight_ptr, in_added, eps,
    HEAD: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Rows of q, normalised where their stream has a weight."""
    q, q_tail = load_rows(ptr, row, stride, left, HEAD, MAIN, TAIL, True)
    if weight_ptr is not None or added_weight_ptr is not None:
        x, x_tail = q.to(tl.float32), q_tail.to(tl.float32)
        weight, weight_tail = load_weights(weight_ptr, added_weight_ptr, in_added, HEAD, MAIN, TAIL)
        rstd = rstd_of(x, x_tail, eps, HEAD, TAIL)[:, None]
        x, x_tail = x * rstd * weight[None, :], x_tail * rstd * weight_tail[None, :]
        q = normalised_or(q, x.to(q.dtype), weight_ptr, added_weight_ptr, in_added)
        q_tail = normalised_or(q_tail, x_tail.to(q.dtype), weight_ptr, added_weight_ptr, in_added)
    return q, q_tail


@triton.jit
def _attend(
    q, q_tail, k, k_tail, v, v_tail, bias, valid, top, total, sums, sums_tail, scale,
    TAIL: tl.constexpr, BIAS: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """One more tile of keys, k transposed, into the running maximum, the running sum and the unnormalised output.

    Logits are in units of ln 2: scale and bias come times log2(e). scale is positive, so the largest product has
    the largest logit. Keys past the edge have bias -inf, or are not `valid`.
    """
    logits = dot(q, q_tail, k, k_tail, TAIL)
    if BIAS:
        logits = logits * scale + bias[None, :]
        new_top = tl.maximum(top, tl.max(logits, 1))
        # all keys so far may be masked: -inf - -inf is no number
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(logits - shift[:, None])
    else:
        if EDGE:
            logits = tl.where(valid[None, :], logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1) * scale)
        shift = new_top
        weights = tl.exp2(logits * scale - shift[:, None])
    shrink = tl.exp2(top - shift)
    total = total * shrink + tl.sum(weights, 1)
    weights = weights.to(v.dtype)
    sums = tl.dot(weights, v, sums * shrink[:, None], input_precision="ieee")
    if TAIL > 0:
        sums_tail = tl.dot(weights, v_tail, sums_tail * shrink[:, None], input_precision="ieee")
    return new_top, total, sums, sums_tail


@triton.jit
def load_bias(ptr, at, key, left, BLOCK_K: tl.constexpr):
    """key_bias[at + key] in units of ln 2, -inf past the edge; zeros if there is none, for nobody."""
    if ptr is not None:
        return tl.load(ptr + at + key, mask=key < left, other=float("-inf")) * LOG2_E
    else:
        return tl.zeros([BLOCK_K], tl.float32)


@triton.jit
def _attend_tile(
    q, q_tail, k_ptr, v_ptr, k_stride, v_stride, bias_ptr, bias_at, begin, left, top, total, sums, sums_tail, scale,
    HEAD: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, BLOCK_K: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """_attend with the keys from `begin` on, of `left` in this stream."""
    key = tl.arange(0, BLOCK_K)
    k_ptr += begin * k_stride
    v_ptr += begin * v_stride
    k, k_tail = load_rows(k_ptr, key, k_stride, left - begin, HEAD, MAIN, TAIL, EDGE)
    bias = load_bias(bias_ptr, bias_at, begin + key, left, BLOCK_K)
    v, v_tail = load_rows(v_ptr, key, v_stride, left - begin, HEAD, MAIN, TAIL, EDGE)
    return _attend(
        q, q_tail, tl.trans(k), tl.trans(k_tail), v, v_tail, bias, key < left - begin,
        top, total, sums, sums_tail, scale, TAIL, bias_ptr is not None, EDGE,
    )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def _normalise_kernel(
    x_ptr, weight_ptr, y_ptr, rows, heads, samples, x_batch, x_row, x_head, eps,
    HEAD: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, BLOCK_R: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """y [B, rows, H, D] = x * rsqrt(mean(x^2) + eps) * weight."""
    at = tl.program_id(0).to(tl.int64) * BLOCK_R
    count = samples.to(tl.int64) * rows * heads
    index = at + tl.arange(0, BLOCK_R)
    h = index % heads
    row = index // heads % rows
    b = index // heads // rows
    offset = b * aligned(x_batch, VECTOR) + row * aligned(x_row, VECTOR) + h * aligned(x_head, VECTOR)
    inside = index < count

    column = tl.arange(0, MAIN)
    inside_main = inside[:, None]
    if MAIN > HEAD:
        inside_main &= (column < HEAD)[None, :]
    x = tl.load(x_ptr + offset[:, None] + column[None, :], mask=inside_main, other=0.0).to(tl.float32)
    x_tail = x
    if TAIL > 0:
        column = MAIN + tl.arange(0, TAIL)
        inside_tail = inside[:, None] & (column < HEAD)[None, :]
        x_tail = tl.load(x_ptr + offset[:, None] + column[None, :], mask=inside_tail, other=0.0).to(tl.float32)
    rstd = rstd_of(x, x_tail, eps, HEAD, TAIL)
    weight, weight_tail = load_weights(weight_ptr, None, False, HEAD, MAIN, TAIL)
    y, y_tail = x * rstd[:, None] * weight[None, :], x_tail * rstd[:, None] * weight_tail[None, :]
    store_rows(y_ptr + at * HEAD, tl.arange(0, BLOCK_R), HEAD, count - at, y, y_tail, HEAD, MAIN, TAIL)


@triton.jit(do_not_specialize=SIZES)
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, added_q_ptr, added_k_ptr, added_v_ptr, q_weight_ptr, added_q_weight_ptr, bias_ptr,
    out_ptr, added_out_ptr, lse_ptr,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    added_q_batch, added_q_row, added_q_head, added_k_batch, added_k_row, added_k_head,
    added_v_batch, added_v_row, added_v_head, heads, queries, added_queries, keys, added_keys, eps, scale,
    STREAMS: tl.constexpr, HEAD: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """BLOCK_Q queries of one head and one stream with all keys."""
    own_blocks = tl.cdiv(queries, BLOCK_Q)
    blocks = own_blocks + tl.cdiv(added_queries, BLOCK_Q)
    block = tl.program_id(0) % blocks
    h = (tl.program_id(0) // blocks % heads).to(tl.int64)
    b = (tl.program_id(0) // blocks // heads).to(tl.int64)
    in_added = block >= own_blocks
    begin = (block - tl.where(in_added, own_blocks, 0)) * BLOCK_Q
    left = tl.where(in_added, added_queries, queries) - begin

    row = tl.arange(0, BLOCK_Q)
    q_source = tl.where(
        in_added, head_of(added_q_ptr, b, h, added_q_batch, added_q_head, VECTOR),
        head_of(q_ptr, b, h, q_batch, q_head, VECTOR),
    )  # fmt: skip
    q_stride = aligned(tl.where(in_added, added_q_row, q_row), VECTOR)
    q, q_tail = _load_queries(
        q_source + begin * q_stride, row, q_stride, left, q_weight_ptr, added_q_weight_ptr, in_added, eps,
        HEAD, MAIN, TAIL,
    )  # fmt: skip

    scale *= LOG2_E
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    sums = tl.zeros([BLOCK_Q, MAIN], tl.float32)
    sums_tail = sums
    if TAIL > 0:
        sums_tail = tl.zeros([BLOCK_Q, TAIL], tl.float32)
    for stream in tl.static_range(STREAMS):
        second = stream > 0
        k_source = tl.where(
            second, head_of(added_k_ptr, b, h, added_k_batch, added_k_head, VECTOR),
            head_of(k_ptr, b, h, k_batch, k_head, VECTOR),
        )  # fmt: skip
        v_source = tl.where(
            second, head_of(added_v_ptr, b, h, added_v_batch, added_v_head, VECTOR),
            head_of(v_ptr, b, h, v_batch, v_head, VECTOR),
        )  # fmt: skip
        k_stride = aligned(tl.where(second, added_k_row, k_row), VECTOR)
        v_stride = aligned(tl.where(second, added_v_row, v_row), VECTOR)
        count = tl.where(second, added_keys, keys)
        bias_at = b * (keys + added_keys) + tl.where(second, keys, 0)
        whole = count // BLOCK_K * BLOCK_K
        for first in tl.range(0, whole, BLOCK_K):
            top, total, sums, sums_tail = _attend_tile(
                q, q_tail, k_source, v_source, k_stride, v_stride, bias_ptr, bias_at, first, count,
                top, total, sums, sums_tail, scale, HEAD, MAIN, TAIL, BLOCK_K, False,
            )  # fmt: skip
        for first in tl.range(whole, count, BLOCK_K, num_stages=1):
            top, total, sums, sums_tail = _attend_tile(
                q, q_tail, k_source, v_source, k_stride, v_stride, bias_ptr, bias_at, first, count,
                top, total, sums, sums_tail, scale, HEAD, MAIN, TAIL, BLOCK_K, True,
            )  # fmt: skip

    lse_at = (b * heads + h) * (queries + added_queries) + tl.where(in_added, queries, 0) + begin
    tl.store(lse_ptr + lse_at + row, top + tl.log2(total), mask=row < left)
    out_stride = heads.to(tl.int64) * HEAD
    target = tl.where(in_added, added_out_ptr, out_ptr)
    target += b * tl.where(in_added, added_queries, queries) * out_stride + begin * out_stride + h * HEAD
    inverse = 1.0 / total[:, None]
    store_rows(target, row, out_stride, left, sums * inverse, sums_tail * inverse, HEAD, MAIN, TAIL)


@triton.jit(do_not_specialize=SIZES)
def _few_keys_kernel(
    q_ptr, k_ptr, v_ptr, q_weight_ptr, bias_ptr, out_ptr, lse_ptr,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, heads, queries, keys, blocks, eps, scale,
    HEAD: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """`blocks` blocks of queries of one head, with all of its keys in one tile that is loaded once."""
    chunks = tl.cdiv(tl.cdiv(queries, BLOCK_Q), blocks)
    chunk = tl.program_id(0) % chunks
    h = (tl.program_id(0) // chunks % heads).to(tl.int64)
    b = (tl.program_id(0) // chunks // heads).to(tl.int64)

    key = tl.arange(0, BLOCK_K)
    k_stride = aligned(k_row, VECTOR)
    v_stride = aligned(v_row, VECTOR)
    k_source = head_of(k_ptr, b, h, k_batch, k_head, VECTOR)
    v_source = head_of(v_ptr, b, h, v_batch, v_head, VECTOR)
    k, k_tail = load_rows(k_source, key, k_stride, keys, HEAD, MAIN, TAIL, True)
    v, v_tail = load_rows(v_source, key, v_stride, keys, HEAD, MAIN, TAIL, True)
    k, k_tail = tl.trans(k), tl.trans(k_tail)

    scale *= LOG2_E
    row = tl.arange(0, BLOCK_Q)
    q_stride = aligned(q_row, VECTOR)
    q_source = head_of(q_ptr, b, h, q_batch, q_head, VECTOR)
    out_stride = heads.to(tl.int64) * HEAD
    for block in tl.range(chunk * blocks, tl.minimum((chunk + 1) * blocks, tl.cdiv(queries, BLOCK_Q))):
        begin = block * BLOCK_Q
        q, q_tail = _load_queries(
            q_source + begin * q_stride, row, q_stride, queries - begin, q_weight_ptr, q_weight_ptr, False, eps,
            HEAD, MAIN, TAIL,
        )  # fmt: skip
        top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_Q], tl.float32)
        sums = tl.zeros([BLOCK_Q, MAIN], tl.float32)
        sums_tail = sums
        if TAIL > 0:
            sums_tail = tl.zeros([BLOCK_Q, TAIL], tl.float32)
        # not kept as well: every thread holds it for a quarter of the keys or more
        bias = load_bias(bias_ptr, b * keys, key, keys, BLOCK_K)
        top, total, sums, sums_tail = _attend(
            q, q_tail, k, k_tail, v, v_tail, bias, key < keys, top, total, sums, sums_tail, scale,
            TAIL, bias_ptr is not None, True,
        )  # fmt: skip
        inside = row < queries - begin
        tl.store(lse_ptr + (b * heads + h) * queries + begin + row, top + tl.log2(total), mask=inside)
        target = out_ptr + (b * queries + begin) * out_stride + h * HEAD
        inverse = 1.0 / total[:, None]
        store_rows(target, row, out_stride, queries - begin, sums * inverse, sums_tail * inverse, HEAD, MAIN, TAIL)


def strides(x: Tensor) -> tuple[int, int, int]:
    """Of batch, row and head; that of an axis of length 1 is as good as 0."""
    batch, row, head = (0 if size == 1 else stride for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True))
    return batch, row, head


def vector_of(tensors: list[Tensor]) -> int:
    """Elements that one 16-byte access may hold; 1 where an access could be misaligned."""
    itemsize = tensors[0].element_size()
    wide = all(
        x.data_ptr() % 16 == 0 and all(n * itemsize % 16 == 0 for n in (x.shape[-1], *strides(x))) for x in tensors
    )
    return 16 // itemsize if wide else 1


def normalise(x: Tensor, weight: Tensor | None, eps: float, config: Config) -> Tensor:
    """RMSNorm of [B, rows, H, D] over D, contiguous; x itself without a weight."""
    if weight is None:
        return x
    y = x.new_empty(*x.shape)
    samples, rows, heads, head_dim = x.shape
    if x.numel():
        _normalise_kernel[(triton.cdiv(samples * rows * heads, config.block_r),)](
            x, weight, y, rows, heads, samples, *strides(x), eps,
            HEAD=head_dim, MAIN=config.main, TAIL=config.tail, BLOCK_R=config.block_r, VECTOR=vector_of([x]),
            num_warps=4,
        )  # fmt: skip
    return y


def forward(
    q: Tensor,  # [B, L, H, D], any strides with D contiguous
    k: Tensor,  # [B, S, H, D]
    v: Tensor,  # [B, S, H, D]
    q_weight: Tensor | None,  # [D], in the dtype of q or fp32; None: not normalised
    k_weight: Tensor | None,  # [D]
    added_q: Tensor | None,  # [B, L2, H, D]; None: no second stream, or its queries are not wanted
    added_k: Tensor | None,  # [B, S2, H, D]
    added_v: Tensor | None,  # [B, S2, H, D]
    added_q_weight: Tensor | None,  # [D]
    added_k_weight: Tensor | None,  # [D]
    key_bias: Tensor | None,  # fp32 [B, S + S2]; -inf masks a key, but never all of a sample
    eps: float,
    scale: float,  # positive
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(out [B, L, H, D], added_out [B, L2, H, D] or None, both contiguous, lse fp32 [B, H, L + L2] in base 2)."""
    samples, queries, heads, head_dim = q.shape
    keys, added_keys = k.shape[1], 0 if added_k is None else added_k.shape[1]
    added_queries = 0 if added_q is None else added_q.shape[1]
    config = configure(head_dim, q.element_size(), architecture(q.device))
    out = q.new_empty(*q.shape)
    added_out = None if added_q is None else q.new_empty(*added_q.shape)
    lse = q.new_empty(samples, heads, queries + added_queries, dtype=torch.float32)
    if lse.numel() == 0:
        return out, added_out, lse

    with guard(q):
        k = normalise(k, k_weight, eps, config)
        vector = vector_of([q, k, v])
        few = few_keys_tile(head_dim, keys, q.element_size(), vector, architecture(q.device))
        if added_k is None and few is not None:
            blocks = few_keys_chunk(samples * heads, triton.cdiv(queries, few.queries), multiprocessors(q.device))
            chunks = triton.cdiv(triton.cdiv(queries, few.queries), blocks)
            _few_keys_kernel[(chunks * heads * samples,)](
                q, k, v, q_weight, key_bias, out, lse, *strides(q), *strides(k), *strides(v),
                heads, queries, keys, blocks, eps, scale,
                HEAD=head_dim, MAIN=config.main, TAIL=config.tail,
                BLOCK_Q=few.queries, BLOCK_K=few.keys, VECTOR=vector,
                num_warps=few.num_warps, num_stages=few.num_stages,
            )  # fmt: skip
            return out, added_out, lse

        tile = config.forward
        # a stream that is not there lends its name to the first: its rows are never reached
        q2, q2_weight = (q, q_weight) if added_q is None else (added_q, added_q_weight)
        k2 = k if added_k is None else normalise(added_k, added_k_weight, eps, config)
        v2 = v if added_v is None else added_v
        blocks = triton.cdiv(queries, tile.queries) + triton.cdiv(added_queries, tile.queries)
        _forward_kernel[(blocks * heads * samples,)](
            q, k, v, q2, k2, v2, q_weight, q2_weight, key_bias, out, out if added_out is None else added_out, lse,
            *strides(q), *strides(k), *strides(v), *strides(q2), *strides(k2), *strides(v2),
            heads, queries, added_queries, keys, added_keys, eps, scale,
            STREAMS=1 if added_k is None else 2, HEAD=head_dim, MAIN=config.main, TAIL=config.tail,
            BLOCK_Q=tile.queries, BLOCK_K=tile.keys, VECTOR=vector_of([q, k, v, q2, k2, v2]),
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return out, added_out, lse
