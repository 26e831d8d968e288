"""Tokenizers and text encoders of SD3's training: files, lengths, losses against formulas, and that they learn."""

import numpy as np
import pytest
import sentencepiece
import torch
from transformers import CLIPTokenizer, T5Tokenizer

from kolors_fast.data.shapes import caption, held_out_prompts, sample_training
from kolors_fast.data.shapes.scene import REQUEST_PARTS
from kolors_fast.training.config import TextEncoderStage, TextTokenizerRecipe, load_recipe
from kolors_fast.training.streams import Streams
from kolors_fast.training.text_encoders import ClipObjective, T5Objective, make_clip, make_t5
from kolors_fast.training.text_tokenizers import (
    PAD_OF_BIGG,
    chinese_words,
    train_clip_tokenizer,
    train_t5_tokenizer,
)
from kolors_fast.training.trainer import Trainer

RECIPE = TextTokenizerRecipe(captions=1500, length=36)
PARTS = sum(np.log(len(part)) for part in REQUEST_PARTS)
# three objects of the most words in the longest template behind the longest background
LONGEST = "on a white background, {0} on the left, {0} in the middle, {0} on the right".format(
    "a red five-pointed star"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(scope="module")
def clip(folder):
    return train_clip_tokenizer(RECIPE, 0, folder / "tokenizer")


@pytest.fixture(scope="module")
def t5(folder):
    return train_t5_tokenizer(RECIPE, 0, folder / "tokenizer_3")


def test_chinese_is_cut_at_the_words_of_the_world():
    assert chinese_words("一个红色的五角星在上方") == ["一个", "红色", "的", "五角星", "在", "上方"]
    assert chinese_words("从左到右依次是大方块") == ["从左到右依次是", "大", "方块"]


def test_words_are_tokens(clip, t5):
    text = "a purple triangle"
    assert clip.tokenize(text) == ["a</w>", "purple</w>", "triangle</w>"]
    assert t5.tokenize(text) == ["▁a", "▁purple", "▁triangle"]
    assert [clip.decode([i]).strip() for i in clip("红色的圆形")["input_ids"][1:-1]] == ["红色", "的", "圆形"]
    assert t5.tokenize("红色的圆形") == ["▁红色", "的", "圆形"]
    assert clip.tokenize("A Purple") == clip.tokenize("a purple")


def test_prompts_fit_the_recipe(clip, t5):
    """Whole for T5; CLIP loses the end of one training caption in a hundred, and of no held-out one."""
    recipe = load_recipe("sd3-tiny")
    rng = np.random.default_rng(9)
    captions = [sample_training(rng)[1] for _ in range(1000)]
    held_out = [one.prompt for one in held_out_prompts(200)]
    lengths = [len(ids) for ids in clip(captions)["input_ids"]]
    assert np.mean([n > recipe.tokenizer.length for n in lengths]) < 0.01
    assert max(len(ids) for ids in clip(held_out)["input_ids"]) <= recipe.tokenizer.length
    assert len(t5(LONGEST)["input_ids"]) == recipe.tokenizer_3.length
    assert max(len(ids) for ids in t5(captions + held_out)["input_ids"]) <= recipe.tokenizer_3.length


def test_the_end_is_clips_largest_id_and_bigg_pads_with_0(clip, folder):
    ids = clip("a red circle")["input_ids"]
    assert ids[0] == clip.bos_token_id == len(clip) - 2 and ids[-1] == clip.eos_token_id == len(clip) - 1
    other = train_clip_tokenizer(RECIPE, 0, folder / "tokenizer_2", PAD_OF_BIGG)
    padded = other("a red circle", padding="max_length")["input_ids"]
    assert padded[: len(ids)] == ids and padded[len(ids) :] == [0] * (36 - len(ids))


def test_released_files_alone_are_enough(clip, t5, folder, tmp_path):
    """vocab.json with merges.txt, and spiece.model, are what older versions and other programs read."""
    texts = ["a small green star", "左边是红色圆形，右边是蓝色方块", "unknown 森林 words"]
    for source, kind, names in (
        (clip, CLIPTokenizer, ("tokenizer/vocab.json", "tokenizer/merges.txt")),
        (t5, T5Tokenizer, ("tokenizer_3/spiece.model",)),
    ):
        alone = tmp_path / kind.__name__
        alone.mkdir()
        for name in (*names, f"{names[0].split('/')[0]}/tokenizer_config.json"):
            (alone / name.split("/")[1]).write_bytes((folder / name).read_bytes())
        assert kind.from_pretrained(alone)(texts)["input_ids"] == source(texts)["input_ids"]
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer_3" / "spiece.model"))
    for text in texts[:2]:
        assert [*pieces.encode(text), 1] == t5(text)["input_ids"]


def test_unseen_text_is_spelt_out(clip, t5):
    assert clip.decode(clip("森林")["input_ids"], skip_special_tokens=True) == "森林"  # bytes
    assert t5.unk_token_id not in t5("zigzag")["input_ids"]
    assert t5.unk_token_id in t5("森林")["input_ids"]


def objective(kind, tokenizer, steps=40, **settings):
    torch.manual_seed(0)
    defaults = {"batch": 16, "learning_rate": 5e-3, "warmup": 2, "decay": 0, "precision": "fp32"}
    name = "clip" if kind is ClipObjective else "t5"
    stage = TextEncoderStage(name=name, objective=name, steps=steps, **(defaults | settings))
    if kind is ClipObjective:
        sizes = {"hidden_size": 32, "intermediate_size": 32, "projection_dim": 32}
        model = make_clip(tokenizer, {**sizes, "num_hidden_layers": 1, "num_attention_heads": 2})
    else:
        model = make_t5(tokenizer, {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2})
    return kind(model, tokenizer, stage, Streams(0, name))


@pytest.mark.parametrize("kind", [ClipObjective, T5Objective])
def test_encoders_learn(kind, clip, t5, tmp_path):
    tokenizer = clip if kind is ClipObjective else t5
    one = objective(kind, tokenizer)
    run = Trainer(one.stage, one, tmp_path)
    losses = [run.train_step() for _ in range(40)]
    knows_nothing = np.log(len(tokenizer)) + one.stage.reading_weight * PARTS
    assert losses[0] == pytest.approx(knows_nothing, rel=0.05)
    assert np.mean(losses[-5:]) < 0.75 * losses[0]
    figures = one.monitor(run.ema.module, tmp_path, 40)
    assert all(0 <= value <= 1 for name, value in figures.items() if "read right" in name)
    assert figures["rms of states"] > 0


def recorded(one):
    """What the objective's encoder is given: (ids, mask) of each call."""
    calls, forward = [], one.module.forward
    one.module.forward = lambda ids, mask=None: calls.append((ids, mask)) or forward(ids, mask)
    return calls


def whole(tokenizer, one, step):
    return tokenizer([text for text, _ in one.captions(step)], padding="max_length", return_tensors="pt")["input_ids"]


def test_clip_predicts_the_end_and_no_pads(clip, monkeypatch):
    one = objective(ClipObjective, clip, batch=8, reading_weight=0.0)
    asked = []
    monkeypatch.setattr(
        "kolors_fast.training.text_encoders.next_token_loss",
        lambda logits, targets: asked.append(targets) or logits.sum(),
    )
    one.loss(0)
    for target, (text, _) in zip(asked[0].tolist(), one.captions(0), strict=True):
        ids = clip(text)["input_ids"]
        assert target == [*ids[1:], *[-100] * (36 - len(ids))]


@pytest.mark.parametrize(("kind", "stand_in"), [(ClipObjective, 0), (T5Objective, 2)])
def test_words_of_every_second_caption_are_hidden(kind, stand_in, clip, t5):
    tokenizer = clip if kind is ClipObjective else t5
    one = objective(kind, tokenizer, batch=128, masked=0.4)
    calls = recorded(one)
    one.loss(0)
    (seen, _), ids = calls[0], whole(tokenizer, one, 0)
    hidden, special = seen != ids, torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    assert not hidden[::2].any() and not (hidden & special).any()
    assert (seen[hidden] == stand_in).all()
    assert float(hidden[1::2].sum() / (~special[1::2]).sum()) == pytest.approx(0.4, abs=0.05)


def test_t5_is_asked_for_hidden_words_alone(t5):
    """An encoder that tells each token's own id knows everything but those."""
    one = objective(T5Objective, t5, batch=32, reading_weight=0.0, masked=0.3)
    one.module.forward = lambda ids, mask: (9.0 * torch.eye(len(t5))[ids], ())
    one.reading_loss = lambda of_parts, requests: 0.0
    wrong = np.log(1 + (np.exp(9) + len(t5) - 2))  # the answer's logit is 0, and that of <unk> 9
    assert float(one.loss(0)) == pytest.approx(wrong, rel=1e-5)


def test_t5_sees_pads_in_every_second_batch(t5):
    one = objective(T5Objective, t5, batch=4)
    calls = recorded(one)
    for step in range(2):
        one.loss(step)
    assert calls[0][1] is None  # SD3's way, and PixArt's
    assert torch.equal(calls[1][1].bool(), whole(t5, one, 1) != t5.pad_token_id)


def test_t5_begins_with_heads_that_look_to_one_side(t5):
    """Behind one such head, a token's state depends on what is on that side of it."""
    model = objective(T5Objective, t5).module.model
    bias = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    before, after = bias[:16].exp().sum(0), bias[16:].exp().sum(0)  # by distance
    assert before[0] > 50 * after[0] and after[1] > 50 * before[1]


@torch.no_grad()
def test_t5_reads_nothing_off_pads_behind_a_mask(t5):
    reader = objective(T5Objective, t5).module
    tokens = t5(["a red circle", "蓝色方块"], padding="max_length", return_tensors="pt")
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    long, short = reader(ids, mask)[1], reader(ids[:, :8], mask[:, :8])[1]
    for a, b in zip(long, short, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_captions_differ_by_step_and_agree_with_their_requests(clip):
    one = objective(ClipObjective, clip, batch=4)
    assert one.captions(0) == one.captions(0) != one.captions(1)
    rng = one.streams.numpy(0)
    assert one.captions(0)[0] == caption(sample_training(rng)[0], rng)
