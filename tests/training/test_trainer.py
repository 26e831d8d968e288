"""The loop: resuming, loss, refusals. Everything tiny."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from kolors_fast.models.autoencoder_kl import AutoencoderKL
from kolors_fast.models.chatglm import ChatGLM
from kolors_fast.training.checkpoint import TrainingStateError, read_state, write_state
from kolors_fast.training.config import AutoencoderStage, LanguageModelStage, TokenizerRecipe
from kolors_fast.training.log import Log
from kolors_fast.training.objectives import AutoencoderObjective, LanguageModelObjective
from kolors_fast.training.streams import Streams
from kolors_fast.training.tokenizer import train_tokenizer
from kolors_fast.training.trainer import STATE, Trainer

VAE = {
    "block_out_channels": (4, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "latent_channels": 2,
    "norm_num_groups": 2,
}
STAGE = AutoencoderStage(
    name="autoencoder",
    objective="autoencoder",
    steps=12,
    batch=2,
    learning_rate=2e-3,
    warmup=2,
    decay=4,
    sizes=((32, 32), (32, 64)),
    checkpoint_every=5,
    monitor_every=1000,
)


class Killed(Exception):
    pass


class Objective(AutoencoderObjective):
    """The autoencoder's, without the monitor, dying at a chosen step."""

    killed_at = None

    def loss(self, step):
        if step == self.killed_at:
            raise Killed
        return super().loss(step)

    def monitor(self, averaged, folder, step):
        return {"step seen": float(step)}


def trainer(folder, stage=STAGE, killed_at=None):
    torch.manual_seed(1)
    objective = Objective(AutoencoderKL(**VAE), stage, Streams(0, stage.name))
    objective.killed_at = killed_at
    return Trainer(stage, objective, folder)


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_killed_and_resumed_is_bit_for_bit_the_same(tmp_path, precision):
    stage = replace(STAGE, precision=precision)
    whole = trainer(tmp_path / "whole", stage)
    averaged = whole.run()

    with pytest.raises(Killed):
        trainer(tmp_path / "killed", stage, killed_at=8).run()
    torch.randn(7)  # a resumed process has another generator state
    resumed = trainer(tmp_path / "killed", stage)
    again = resumed.run()
    assert resumed.step == whole.step == 12
    assert torch.equal(weights(again), weights(averaged))
    assert torch.equal(weights(resumed.module), weights(whole.module))
    steps = [json.loads(line)["step"] for line in (tmp_path / "killed" / "log.jsonl").read_text().splitlines()]
    assert steps == [12, 12]  # the loss, the monitor


def test_a_finished_stage_is_not_trained_again(tmp_path):
    first = weights(trainer(tmp_path).run())
    assert torch.equal(weights(trainer(tmp_path, killed_at=0).run()), first)


def test_log_forgets_what_is_done_again(tmp_path):
    log = Log(tmp_path)
    for step in (100, 200, 300):
        log.write(step, {"loss": step / 7})
    log.close()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 400, "lo')  # killed while writing
    Log(tmp_path, 200).write(300, {"loss": 1.0})
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(100, 100 / 7), (200, 200 / 7), (300, 1.0)]


def test_learning_rate_schedule(tmp_path):
    run = trainer(tmp_path)
    rates = []
    for step in range(STAGE.steps):
        run.step = step
        rates.append(run.learning_rate() / STAGE.learning_rate)
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])


def test_autoencoder_learns(tmp_path):
    stage = replace(STAGE, steps=60, learning_rate=1e-2, decay=10, sizes=((32, 32),), batch=4)
    run = trainer(tmp_path, stage)
    losses = [run.train_step() for _ in range(60)]
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])


def test_language_model_learns(tmp_path):
    tokenizer = train_tokenizer(TokenizerRecipe(pieces=400, captions=500), 0, tmp_path / "tokenizer")
    model = ChatGLM(
        num_layers=2, padded_vocab_size=tokenizer.vocab_size, hidden_size=32, ffn_hidden_size=48, kv_channels=16,
        num_attention_heads=2, multi_query_attention=True, add_qkv_bias=True, add_lm_head=True,
    )  # fmt: skip
    stage = LanguageModelStage(
        name="lm", objective="language_model", steps=40, batch=16, learning_rate=1e-2, warmup=2, decay=0
    )
    objective = LanguageModelObjective(model, tokenizer, stage, Streams(0, "lm"))
    run = Trainer(stage, objective, tmp_path)
    losses = [run.train_step() for _ in range(40)]
    assert losses[0] == pytest.approx(np.log(tokenizer.vocab_size), rel=0.1)  # knows nothing
    assert np.mean(losses[-5:]) < 0.6 * losses[0]


def test_language_model_targets(tmp_path):
    tokenizer = train_tokenizer(TokenizerRecipe(pieces=400, captions=500), 0, tmp_path / "tokenizer")
    stage = LanguageModelStage(
        name="lm", objective="language_model", steps=1, batch=8, learning_rate=1.0, warmup=0, decay=0
    )
    ids, targets, visible = LanguageModelObjective(torch.nn.Module(), tokenizer, stage, Streams(0, "lm")).tokens(0)
    assert (ids[:, :2] == torch.tensor(tokenizer.prefix)).all()
    assert (targets[:, 0] == -100).all()
    for row, target in zip(ids.tolist(), targets.tolist(), strict=True):
        wanted = [t for t in target if t != -100]
        assert wanted[-1] == tokenizer.eos_token_id
        assert row[2 : 1 + len(wanted)] == wanted[:-1]  # the next token, one place on
        assert wanted.count(tokenizer.eos_token_id) in (1, 2)
    for row, seen in zip(ids.tolist(), visible[:, 0], strict=True):
        if tokenizer.eos_token_id not in row:  # the longest row, of one caption
            continue
        end = row.index(tokenizer.eos_token_id)
        assert torch.equal(seen[:end, :end], torch.ones(end, end, dtype=torch.bool).tril())
        for query in range(end, len(row)):  # the prefix, the caption's last token, and what follows it
            assert seen[query].nonzero().flatten().tolist() == [0, 1, *range(end - 1, query + 1)]


def test_no_stream_repeats():
    keys = {tuple(np.random.SeedSequence(Streams(0, name, rank).key(step)).generate_state(2).tolist())
            for name in "ab" for rank in range(3) for step in range(3)}  # fmt: skip
    assert len(keys) == 18
    assert Streams(0, "a", 1).shared(5).integers(1 << 30) == Streams(0, "a", 2).shared(5).integers(1 << 30)


def test_broken_state_is_named(tmp_path):
    path = tmp_path / STATE
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(TrainingStateError, match=r"state\.pt is not a readable training checkpoint"):
        read_state(path)
    with pytest.raises(TrainingStateError, match=r"state\.pt"):
        trainer(tmp_path).run()
    write_state(path, {"step": 3})
    with pytest.raises(TrainingStateError, match="does not fit stage 'autoencoder'"):
        trainer(tmp_path).run()


def test_a_failed_write_keeps_the_last_good_state(tmp_path, monkeypatch):
    path = tmp_path / STATE
    write_state(path, {"step": 1})

    def half(state, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="disk full"):
        write_state(path, {"step": 2})
    assert read_state(path) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == [STATE]
