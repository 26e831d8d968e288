"""ChatGLM3, the language model that reads Kolors' prompts.

Shapes: B prompts, S tokens, D hidden size, H heads, G key/value heads, K = kv_channels (head size), V vocabulary.
Source: THUDM/ChatGLM3 and Kwai-Kolors/Kolors `kolors/models/modeling_chatglm.py`; config and state-dict keys
are those of that ChatGLMModel, so a released `text_encoder` folder loads.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checkpoint import PretrainedModel
from .weight_only import QUANTIZATIONS, WeightOnlyLinear, quantize

# options of the original code that no released Kolors encoder uses, at the only value supported here
_FIXED_OPTIONS: dict[str, Any] = {
    "rmsnorm": True,
    "post_layer_norm": True,
    "apply_residual_connection_post_layernorm": False,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "quantization_bit": 0,
    "pre_seq_len": None,
    "prefix_projection": False,
}

# the layers of a block that quantisation replaces, as in the original code
_PROJECTIONS = (
    ("self_attention", "query_key_value"),
    ("self_attention", "dense"),
    ("mlp", "dense_h_to_4h"),
    ("mlp", "dense_4h_to_h"),
)
Self = TypeVar("Self", bound="ChatGLM")


@dataclass
class ChatGLMOutput:
    """What `ChatGLM.forward` returns.

    last_hidden_state: [S, B, D], after the final norm.
    hidden_states: the embedding output, then each layer's output, [S, B, D] each, none through the final norm.
    """

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None = None


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class RMSNorm(nn.Module):
    """x * rsqrt(mean(x^2) + eps) * weight over the last axis, computed in fp32 and rounded once."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = _wide(x)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (y * self.weight).to(x.dtype)


class RotaryEmbedding(nn.Module):
    """Angles of the rotary position embedding, theta_i = 10000^(-2i / dim).

    The buffer only keeps the released state-dict key: a model moved to fp16 rounds it, so the angles are computed
    anew in fp32, for the positions at hand alone (the original tabulates all 32768 at every call).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("inv_freq", self.frequencies())

    def frequencies(self, device: torch.device | str | None = None) -> Tensor:
        exponent = torch.arange(0, self.dim, 2, dtype=torch.float32, device=device) / self.dim
        return 1.0 / 10000**exponent  # [dim / 2]

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angle = position_ids[..., None].float() * self.frequencies(position_ids.device)  # [B, S, dim / 2]
        return angle.cos()[:, :, None], angle.sin()[:, :, None]  # [B, S, 1, dim / 2], one for all heads


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the interleaved pairs (2i, 2i+1) of the first part of each head; the rest passes. x [B, S, H, K]."""
    cos, sin = rotary
    turned = 2 * cos.shape[-1]
    a, b = x[..., :turned].unflatten(-1, (-1, 2)).unbind(-1)  # times fp32 cos and sin: fp32 until the cast
    pairs = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).to(x.dtype)
    return torch.cat([pairs, x[..., turned:]], dim=-1)


@dataclass
class AttentionPattern:
    """Which keys each query sees.

    visible: [B, 1, S, S] bool, or None for plain causal attention.
    first_row_bias: [B, S] fp32, added to the logits of the first query, which then ignores `visible`. A row of its
    own, because ln(256 - n) would lose three digits in an fp16 mask.
    """

    visible: Tensor | None = None
    first_row_bias: Tensor | None = None


class SelfAttention(nn.Module):
    """Causal multi-query attention with rotary positions."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.head_size = config.kv_channels
        self.multi_query = config.multi_query_attention
        self.groups = config.multi_query_group_num if self.multi_query else self.heads
        width = self.heads * self.head_size
        self.query_key_value = nn.Linear(
            config.hidden_size,
            width + 2 * self.groups * self.head_size,
            bias=config.add_bias_linear or config.add_qkv_bias,
        )
        self.dense = nn.Linear(width, config.hidden_size, bias=config.add_bias_linear)

    def split(self, qkv: Tensor) -> list[Tensor]:
        """q [B, S, H, K], k and v [B, S, G, K]; with one k and v per head, the rows of a head lie together."""
        if not self.multi_query:
            return list(qkv.unflatten(-1, (self.heads, 3 * self.head_size)).chunk(3, dim=-1))
        sizes = [count * self.head_size for count in (self.heads, self.groups, self.groups)]
        return [part.unflatten(-1, (-1, self.head_size)) for part in qkv.split(sizes, dim=-1)]

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], pattern: AttentionPattern) -> Tensor:
        q, k, v = self.split(self.query_key_value(x))
        q, k, v = (t.transpose(1, 2) for t in (rotate(q, rotary), rotate(k, rotary), v))  # [B, H or G, S, K]
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=pattern.visible, is_causal=pattern.visible is None, enable_gqa=True
        )
        if pattern.first_row_bias is not None:
            first = self._biased_row(q[:, :, :1], k, v, pattern.first_row_bias)
            y = torch.cat([first, y[:, :, 1:]], dim=2)
        return self.dense(y.transpose(1, 2).flatten(2))

    def _biased_row(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        grouped = _wide(q).unflatten(1, (self.groups, -1)).squeeze(3)  # [B, G, H / G, K]
        logits = grouped @ _wide(k).transpose(-1, -2) / math.sqrt(self.head_size) + bias[:, None, None]
        return (logits.softmax(-1) @ _wide(v)).flatten(1, 2).unsqueeze(2).to(q.dtype)  # [B, H, 1, K]


class MLP(nn.Module):
    """W2 (silu(a) * b) with [a | b] = W1 x."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        bias = config.add_bias_linear
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=bias)
        self.dense_4h_to_h = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.dense_h_to_4h(x).chunk(2, dim=-1)
        return self.dense_4h_to_h(F.silu(gate) * value)


class Block(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.self_attention = SelfAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], pattern: AttentionPattern) -> Tensor:
        x = x + self.self_attention(self.input_layernorm(x), rotary, pattern)
        return x + self.mlp(self.post_attention_layernorm(x))


class Embedding(nn.Module):
    """Holds the released key `embedding.word_embeddings`."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.padded_vocab_size, config.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.word_embeddings(input_ids)


class Encoder(nn.Module):
    """The stack of blocks and the final norm."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon)


class ChatGLM(PretrainedModel):
    """ChatGLM3 as Kolors' text encoder, and, with `add_lm_head`, as a language model to train.

    Config names and defaults are those of the original ChatGLMConfig (the released file differs from the defaults:
    multi-query attention with 2 groups, qkv bias). Names that do not change the mathematics are kept in `config`.

    Raises:
        ValueError: an option of the original code is set to a value that is not supported here.
    """

    weights_name = "model.safetensors"
    bin_weights_name = "pytorch_model.bin"
    diffusers_name = "ChatGLMModel"
    _other_names = ("ChatGLMForConditionalGeneration",)
    _unused_keys = ("output_layer",)

    def __init__(
        self,
        *,
        num_layers: int = 28,
        padded_vocab_size: int = 65024,
        hidden_size: int = 4096,
        ffn_hidden_size: int = 13696,
        kv_channels: int = 128,
        num_attention_heads: int = 32,
        seq_length: int = 2048,
        layernorm_epsilon: float = 1e-5,
        add_bias_linear: bool = False,
        add_qkv_bias: bool = False,
        multi_query_attention: bool = False,
        multi_query_group_num: int = 1,
        add_lm_head: bool = False,
        **others: Any,
    ) -> None:
        super().__init__()
        for name, supported in _FIXED_OPTIONS.items():
            if others.get(name, supported) != supported:
                raise ValueError(f"ChatGLM supports only {name}={supported}, got {others[name]}")
        if kv_channels % 4:
            raise ValueError(f"kv_channels must be a multiple of 4 (half is rotated in pairs), got {kv_channels}")
        if multi_query_attention and num_attention_heads % multi_query_group_num:
            raise ValueError(
                f"num_attention_heads must be a multiple of multi_query_group_num={multi_query_group_num}, "
                f"got {num_attention_heads}"
            )
        self.register_config(
            num_layers=num_layers,
            padded_vocab_size=padded_vocab_size,
            hidden_size=hidden_size,
            ffn_hidden_size=ffn_hidden_size,
            kv_channels=kv_channels,
            num_attention_heads=num_attention_heads,
            seq_length=seq_length,
            layernorm_epsilon=layernorm_epsilon,
            add_bias_linear=add_bias_linear,
            add_qkv_bias=add_qkv_bias,
            multi_query_attention=multi_query_attention,
            multi_query_group_num=multi_query_group_num,
            **others,
            **({"add_lm_head": True} if add_lm_head else {}),
        )
        self.embedding = Embedding(self.config)
        self.rotary_pos_emb = RotaryEmbedding(kv_channels // 2)
        self.encoder = Encoder(self.config)
        self.output_layer = nn.Linear(hidden_size, padded_vocab_size, bias=False) if add_lm_head else None
        self.reset_parameters()

    @classmethod
    def from_pretrained(
        cls: type[Self],
        path_or_id: str | os.PathLike[str],
        *,
        subfolder: str | None = None,
        torch_dtype: torch.dtype | None = None,
        variant: str | None = None,
        device: torch.device | str | None = None,
        quantization: str | None = None,
    ) -> Self:
        """Load a model as every model is loaded (see `PretrainedModel.from_pretrained`), or quantised.

        Args:
            quantization: None, "int8" or "int4", see `quantize_`; layer by layer, so that the model in the dtype of
                its file never exists as a whole.
        """
        model = cls.empty(cls.load_config(path_or_id, subfolder=subfolder), torch_dtype)
        if quantization is not None:
            model.quantize_(quantization)
        model.load_weights(path_or_id, subfolder=subfolder, variant=variant, device=device)
        return model

    def quantize_(self: Self, quantization: str) -> Self:
        """Keep the four projections of every layer in 8 or 4 bits per weight ("int8", "int4"), in place.

        Activations, and all arithmetic, stay in the model's dtype (weight-only, see `WeightOnlyLinear`). A quantised
        model reads prompts; it can be neither trained nor saved.
        """
        if quantization not in QUANTIZATIONS:
            raise ValueError(f"ChatGLM: quantization: expected 'int8' or 'int4', got {quantization!r}")
        if self.quantization is not None:
            raise ValueError(f"ChatGLM: quantization: expected a model that is not quantised, got {self.quantization}")
        for layer in self.encoder.layers:
            for part, name in _PROJECTIONS:
                parent = layer.get_submodule(part)
                setattr(parent, name, WeightOnlyLinear.from_linear(getattr(parent, name), QUANTIZATIONS[quantization]))
        return self

    @property
    def quantization(self) -> str | None:
        """ "int8", "int4", or None for a model whose weights are floating-point numbers."""
        layers = (module for module in self.modules() if isinstance(module, WeightOnlyLinear))
        return next((f"int{layer.bits}" for layer in layers), None)

    def save_pretrained(self, folder: str | os.PathLike[str], **options: Any) -> None:
        """As every model, see `PretrainedModel.save_pretrained`.

        Raises:
            ValueError: the model is quantised.
        """
        if self.quantization is not None:
            raise ValueError(
                f"ChatGLM: save_pretrained: expected a model that is not quantised, got {self.quantization}; "
                "save the original, and quantise it while loading"
            )
        super().save_pretrained(folder, **options)

    def reset_parameters(self) -> None:
        """Initialise for training: N(0, 0.02), the projections that end a residual branch divided by sqrt(2 L)."""
        for name, module in self.named_modules():
            if not isinstance(module, nn.Linear | nn.Embedding):
                continue
            ends_branch = name.endswith((".dense", ".dense_4h_to_h"))
            nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * self.config.num_layers if ends_branch else 1))
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_hidden_states: bool = True,
        return_dict: bool = True,
    ) -> ChatGLMOutput | tuple[Any, ...]:
        """Run all layers.

        Real tokens attend causally to real tokens; pad tokens attend to every token, as in the original.

        Args:
            input_ids: [B, S] int64.
            attention_mask: [B, S], 1 for real tokens and 0 for pads; None when there is no pad.
            position_ids: [B, S] int64; None counts from 0.
            output_hidden_states: return the input and output of every layer too.
            return_dict: False returns a tuple without names.
        """
        running = self._run(input_ids, position_ids, _pad_pattern(input_ids, attention_mask))
        states = deque(running, maxlen=None if output_hidden_states else 1)
        last = self.encoder.final_layernorm(states[-1]).transpose(0, 1)
        hidden = tuple(state.transpose(0, 1) for state in states) if output_hidden_states else None
        if return_dict:
            return ChatGLMOutput(last, hidden)
        return (last,) if hidden is None else (last, hidden)

    def logits(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Next-token logits [B, S, V]; needs a model built with `add_lm_head=True`."""
        if self.output_layer is None:
            raise ValueError("logits needs a ChatGLM with add_lm_head=True, got one without an output layer")
        states = deque(self._run(input_ids, position_ids, _pad_pattern(input_ids, attention_mask)), maxlen=1)
        return self.output_layer(self.encoder.final_layernorm(states[-1]))

    def text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What Kolors' UNet reads: the output of the last layer but one, and the last layer's at the last token.

        Returns:
            prompt_embeds [B, S, D] and pooled [B, D].
        """
        before, last = deque(self._run(input_ids, position_ids, _pad_pattern(input_ids, attention_mask)), maxlen=2)
        return before, last[:, -1]

    def text_features_collapsed(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`text_features` with the S - n identical pads of each prompt computed as one: exact, and much shorter.

        All pads of a prompt have the same id and position and see the same keys, so they stay identical. In any
        softmax over the tokens they count like one key whose logit is raised by ln(S - n).

        Args:
            input_ids: [B, S], padded on the left with one id.
            attention_mask: [B, S], 0 for pads, then 1 for the n real tokens; n differs between prompts.
            position_ids: [B, S], the same for all pads of a prompt; None counts from 0 at the first real token.

        Returns:
            embeds [B, N+1, D]: the pad, then the real tokens, then zeros up to the largest n, N.
            key_bias [B, N+1] fp32: ln(S - n), zeros, -inf where embeds holds no token (no pad: first is -inf).
            pooled [B, D].
        """
        lengths = attention_mask.sum(1)  # [B]
        longest = int(lengths.max())
        rank = torch.arange(longest + 1, device=input_ids.device).expand(len(lengths), -1)  # 0 pad, 1.. real
        pads = input_ids.shape[1] - lengths[:, None]  # [B, 1]
        real = (rank >= 1) & (rank <= lengths[:, None])
        if not torch.equal(attention_mask != 0, torch.arange(input_ids.shape[1], device=pads.device) >= pads):
            raise ValueError("attention_mask must be zeros, then ones in each row (padding on the left)")
        source = torch.where(real, pads + rank - 1, 0)  # the first column is a pad wherever there is one
        ids = input_ids.gather(1, source)
        positions = (rank - 1).clamp(min=0) if position_ids is None else position_ids.gather(1, source)
        key_bias = torch.where(real, 0.0, float("-inf"))
        key_bias[:, 0] = pads[:, 0].float().log()  # ln 0 = -inf: no pad, no key

        # real rows are causal over real keys; the filler after them is seen by none of them
        visible = torch.ones(longest + 1, longest + 1, dtype=torch.bool, device=ids.device).tril()
        visible[1:, 0] = False
        pattern = AttentionPattern(visible[None, None], key_bias)
        before, last = deque(self._run(ids, positions, pattern), maxlen=2)
        embeds = before.masked_fill((key_bias == float("-inf"))[..., None], 0.0)
        pooled = last[torch.arange(len(lengths), device=ids.device), lengths]
        return embeds, key_bias, pooled

    def _run(self, input_ids: Tensor, position_ids: Tensor | None, pattern: AttentionPattern) -> Iterator[Tensor]:
        """The embedding output, then the output of each layer, [B, S, D] each; what the caller drops is freed."""
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        rotary = self.rotary_pos_emb(position_ids)
        state = self.embedding(input_ids)
        yield state
        for layer in self.encoder.layers:
            state = layer(state, rotary, pattern)
            yield state

    def _stored_state(self) -> dict[str, Tensor]:
        state = self.state_dict()
        for name, module in self.named_modules():
            if isinstance(module, WeightOnlyLinear):
                del state[f"{name}.scale_bits"]
                state[f"{name}.weight"] = torch.empty(module.out_features, module.in_features, device="meta")
        return state

    def _load_tensor(self, key: str, value: Tensor, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        path, _, name = key.rpartition(".")
        module = self.get_submodule(path)
        if not (isinstance(module, WeightOnlyLinear) and name == "weight"):
            return super()._load_tensor(key, value, dtype, device)
        weight, scale_bits = quantize(value, module.bits, device)
        return {key: weight, f"{path}.scale_bits": scale_bits}

    def _convert_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Chat checkpoints prefix every key with `transformer.`; newer files may leave out the computed buffer."""
        state = {key.removeprefix("transformer."): value for key, value in state.items()}
        state.setdefault("rotary_pos_emb.inv_freq", self.rotary_pos_emb.frequencies("cpu"))
        return state

    def _config_to_save(self) -> dict[str, Any]:
        dtype = str(self.dtype).removeprefix("torch.")
        return {
            "model_type": "chatglm",
            "original_rope": True,
            **self.config,
            "architectures": [self.diffusers_name],
            "torch_dtype": dtype,
        }


def _pad_pattern(input_ids: Tensor, attention_mask: Tensor | None) -> AttentionPattern:
    if attention_mask is None:
        return AttentionPattern()
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must have the shape of input_ids, {tuple(input_ids.shape)}, "
            f"got {tuple(attention_mask.shape)}"
        )
    length = input_ids.shape[1]
    real = attention_mask != 0  # [B, S]
    causal = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).tril()
    return AttentionPattern(((causal & real[:, None, :]) | ~real[:, :, None])[:, None])
