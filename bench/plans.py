"""The memory plans for Kolors' own sizes at 1024x1024 in float16 on a GPU, computed from shapes alone:

python bench/plans.py
"""

from __future__ import annotations

import torch
from bench_models import KOLORS_UNET

from kolors_fast.benchmark_models import KOLORS_VAE
from kolors_fast.pipelines.memory import plans

CHATGLM = {
    "num_layers": 28,
    "hidden_size": 4096,
    "ffn_hidden_size": 13696,
    "num_attention_heads": 32,
    "kv_channels": 128,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "padded_vocab_size": 65024,
    "add_qkv_bias": True,
}

if __name__ == "__main__":
    configs = {"text_encoder": CHATGLM, "unet": KOLORS_UNET, "vae": KOLORS_VAE}
    for plan in plans(configs, 1024, 1024, 1, torch.float16, "cuda", None):
        print(f"{plan.most / 2**30:6.2f} GiB  {plan.name}")
