"""The loop: resuming, loss, refusals. Everything tiny."""

import gc
import json
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kolors_fast.data.shapes.scene import REQUEST_PARTS
from kolors_fast.models.autoencoder_kl import AutoencoderKL
from kolors_fast.models.chatglm import ChatGLM
from kolors_fast.training.checkpoint import TrainingStateError
from kolors_fast.training.config import AutoencoderStage, LanguageModelStage, RecipeError, TokenizerRecipe
from kolors_fast.training.log import Log
from kolors_fast.training.objectives import AutoencoderObjective, LanguageModelObjective
from kolors_fast.training.streams import Streams
from kolors_fast.training.tokenizer import train_tokenizer
from kolors_fast.training.trainer import Trainer, computing_in

from . import tiny

VAE = {
    "block_out_channels": (4, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "latent_channels": 3,
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
    assert steps == [10, 12, 12]  # the loss, the monitor


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
    resumed = Log(tmp_path, 200)
    resumed.write(300, {"loss": 1.0})
    resumed.close()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(100, 100 / 7), (200, 200 / 7), (300, 1.0)]
    if find_spec("tensorboard") is not None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        shown = [(event.step, event.value) for event in events.Scalars("loss")]
        assert shown == [(100, pytest.approx(100 / 7)), (200, pytest.approx(200 / 7)), (300, 1.0)]


def test_the_time_of_a_step_is_without_what_lies_between_steps(tmp_path, monkeypatch):
    """By a clock that a step moves by one second, and a look at the average by a thousand."""
    now, step = [0.0], Trainer.train_step

    def train_step(one):
        now[0] += 1
        return step(one)

    class Looking(tiny.Epsilon):
        def monitor(self, averaged, folder, step):
            now[0] += 1000
            return {}

    stage, objective = tiny.make("epsilon", monitor_every=4)
    objective.__class__ = Looking
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", train_step)
        patch.setattr("kolors_fast.training.trainer.time", SimpleNamespace(time=lambda: now[0]))
        Trainer(stage, objective, tmp_path).run()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["seconds per step"] for line in lines if "seconds per step" in line] == [1.0, 1.0]


def test_updates_may_be_skipped_for_a_while(tmp_path):
    """As a gradient scale needs that begins too high; but not without end."""

    def until(step):
        stage, objective = tiny.make("epsilon", steps=400)
        objective.loss = partial(_infinite_gradients, objective.loss, step)
        one = Trainer(stage, objective, tmp_path / str(step))
        one.run()
        return one

    one = until(60)
    assert float(one.skipped) == 60
    lines = [json.loads(line) for line in (tmp_path / "60" / "log.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "learning rate" in line]
    assert [line["step"] for line in lines] == [*range(13, 400, 13), 400]  # 31 points of a curve
    assert [line["skipped updates"] for line in lines[:6]] == [13, 13, 13, 13, 8, 0]
    assert lines[-1]["learning rate"] == pytest.approx(1e-3 / 4)  # of the last update: decay = 4
    with pytest.raises(TrainingStateError, match=r"step 104: .* and 104 updates in a row that were skipped"):
        until(1000)


def _infinite_gradients(loss, last, step):
    found = loss(step)
    if step < last:
        found.register_hook(lambda grad: grad * float("inf"))
    return found


def test_learning_rate_schedule(tmp_path):
    run = trainer(tmp_path)
    rates = []
    for step in range(STAGE.steps):
        run.step = step
        rates.append(run.learning_rate() / STAGE.learning_rate)
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])


def test_autoencoder_learns(tmp_path):
    stage = replace(STAGE, steps=60, learning_rate=4e-3, decay=10, sizes=((32, 32),), batch=4)
    run = trainer(tmp_path, stage)
    losses = [float(run.train_step()) for _ in range(60)]
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])


def test_every_process_draws_latents_to_the_same_colours():
    streams = [Streams(0, "vae"), Streams(0, "vae", 0, 2), Streams(0, "vae", 1, 2)]
    whole, *parts = [AutoencoderObjective(AutoencoderKL(**VAE), STAGE, one) for one in streams]
    for part in parts:
        assert torch.equal(part.whitening, whole.whitening)
    for step in range(4):
        pictures = torch.cat([part.pictures(step) for part in parts])
        if len(pictures) == len(whole.pictures(step)):  # two of the larger size are not split
            assert torch.equal(pictures, whole.pictures(step))


def test_latents_too_few_for_the_colours_are_refused():
    with pytest.raises(ValueError, match="latent_channels: expected 3 or more, got 2"):
        AutoencoderObjective(AutoencoderKL(**{**VAE, "latent_channels": 2}), STAGE, Streams(0, "vae"))


def language_model_objective(folder, batch=16):
    tokenizer = train_tokenizer(TokenizerRecipe(pieces=400, captions=500), 0, folder / "tokenizer")
    torch.manual_seed(0)
    model = ChatGLM(
        num_layers=2, padded_vocab_size=tokenizer.vocab_size, hidden_size=32, ffn_hidden_size=48, kv_channels=16,
        num_attention_heads=2, multi_query_attention=True, add_qkv_bias=True, add_lm_head=True,
    )  # fmt: skip
    stage = LanguageModelStage(
        name="lm", objective="language_model", steps=40, batch=batch, learning_rate=1e-2, warmup=2, decay=0
    )
    return LanguageModelObjective(model, tokenizer, stage, Streams(0, "lm"))


def test_language_model_learns(tmp_path):
    objective = language_model_objective(tmp_path)
    run = Trainer(objective.stage, objective, tmp_path)
    losses = [float(run.train_step()) for _ in range(40)]
    vocabulary = objective.tokenizer.vocab_size
    knows_nothing = np.log(vocabulary) + objective.stage.reading_weight * sum(np.log(len(p)) for p in REQUEST_PARTS)
    assert losses[0] == pytest.approx(knows_nothing, rel=0.05)
    assert np.mean(losses[-5:]) < 0.6 * losses[0]


def test_language_model_targets(tmp_path):
    objective = language_model_objective(tmp_path, batch=8)
    ids, targets, lengths, _ = objective.tensors(objective.captions(0))
    eos, prefix = objective.tokenizer.eos_token_id, objective.tokenizer.prefix
    assert (ids[:, :2] == torch.tensor(prefix)).all()
    for row, target, length in zip(ids, targets, lengths, strict=True):
        assert target[0] == -100  # sop is given, not predicted
        assert target[1:length].tolist() == [*row[2:length].tolist(), eos]
        assert (target[length:] == -100).all()


def test_request_is_read_off_the_last_token(tmp_path):
    objective = language_model_objective(tmp_path, batch=8)
    ids, _, lengths, parts = objective.tensors(objective.captions(0))
    of_parts = objective.module(ids, lengths)[1]
    assert [len(one[0]) for one in of_parts] == [len(part) for part in REQUEST_PARTS]
    assert parts.shape == (8, len(REQUEST_PARTS))
    reader, other = objective.module, ids.clone()
    for row, length in enumerate(lengths):
        state = reader.model(ids[row : row + 1, :length]).last_hidden_state[-1]  # [1, D], of the caption's last token
        for one, whole in zip(reader.parts(state).split([len(p) for p in REQUEST_PARTS], 1), of_parts, strict=True):
            assert torch.allclose(one[0], whole[row], atol=1e-5)
        other[row, length:] = 7  # what stands behind a caption is not read
    for one, same in zip(objective.module(other, lengths)[1], of_parts, strict=True):
        assert torch.allclose(one, same, atol=1e-5)


def test_no_stream_repeats():
    keys = {tuple(np.random.SeedSequence(Streams(0, name).key(step)).generate_state(2).tolist())
            for name in "ab" for step in range(3)}  # fmt: skip
    assert len(keys) == 6
    one = Streams(0, "a")
    assert one.numpy(5).integers(1 << 30) != one.choice(5).integers(1 << 30)
    noise = one.noise(5, 6, (4,))
    assert noise.unique().numel() == 24 and not torch.equal(noise, one.noise(6, 6, (4,)))


@pytest.mark.parametrize("size", [2, 3])
def test_processes_draw_parts_of_the_same_batch(size):
    whole = Streams(0, "a")
    parts = [Streams(0, "a", rank, size) for rank in range(size)]
    assert torch.equal(torch.cat([one.noise(3, 6, (2, 5)) for one in parts]), whole.noise(3, 6, (2, 5)))
    assert [i for one in parts for i in range(6)[one.share(6)]] == list(range(6))
    with pytest.raises(ValueError, match=f"batch: expected a multiple of {size}, processes times accumulate, got 7"):
        parts[0].share(7)


@pytest.mark.parametrize("name", tiny.OBJECTIVES)
def test_a_batch_in_parts_has_the_same_gradient(tmp_path, name):
    def train(parts):
        stage, objective = tiny.make(name, accumulate=parts)
        one, seen = Trainer(stage, objective, tmp_path), []
        loss = one.loss
        one.loss = lambda step: seen.append(objective.streams.size) or loss(step)
        losses = [float(one.train_step()) for _ in range(6)]
        assert seen == [parts] * parts * 6
        return losses, objective.bins.read(), {key: p.detach() for key, p in objective.module.named_parameters()}

    whole, bins, expected = train(1)
    for parts in (2, 8):
        losses, seen, found = train(parts)
        assert losses == pytest.approx(whole, rel=1e-5)
        assert seen == pytest.approx(bins, rel=1e-5)
        error = torch.stack([(found[key] - value).norm() for key, value in expected.items()]).norm()
        assert float(error / torch.stack([value.norm() for value in expected.values()]).norm()) < 1e-5


def test_what_is_there_is_no_garbage_while_a_run_lasts(tmp_path):
    class Looking(tiny.Epsilon):
        def monitor(self, averaged, folder, step):
            frozen.append(gc.get_freeze_count())
            return {}

    frozen = []
    stage, objective = tiny.make("epsilon", steps=2, warmup=1, decay=1, monitor_every=1)
    objective.__class__ = Looking
    before = gc.get_freeze_count()
    Trainer(stage, objective, tmp_path).run()
    assert len(frozen) == 2 and min(frozen) > before + 100_000 and gc.get_freeze_count() == before


def test_parts_that_cannot_be_made(tmp_path):
    stage, objective = tiny.make("epsilon", accumulate=3)
    with pytest.raises(ValueError, match="batch: expected a multiple of 3, processes times accumulate, got 8"):
        Trainer(stage, objective, tmp_path).train_step()
    with pytest.raises(RecipeError, match="accumulate: expected 1 where no denoiser is trained"):
        replace(STAGE, accumulate=2)


@pytest.mark.parametrize("masked", [False, True])
def test_autocast_leaves_attention_in_full_precision(masked):
    q, k, v = (torch.randn(2, 3, 5, 8, dtype=torch.float64) for _ in range(3))
    visible = torch.where(torch.arange(5) < 4, 0.0, float("-inf")).double().expand(2, 3, 5, 5) if masked else None
    scores = q @ k.mT / 8**0.5 + (0 if visible is None else visible)
    expected = scores.softmax(-1) @ v
    with computing_in("bf16"):
        mask = None if visible is None else visible.bfloat16()  # as models make it of their bf16 queries
        found = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask)
        product = torch.matmul(q.float(), k.float().mT)
    assert found.dtype == torch.float32 and product.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
