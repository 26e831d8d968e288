"""Per-resblock gradient scaling: its rule against arithmetic, and where one scale for all does not do."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kolors_fast.training import gradient_scaling
from kolors_fast.training.checkpoint import read_state, write_state
from kolors_fast.training.gradient_scaling import BlockGradientScaler, Branch

WIDTH = 8


class MLP(nn.Module):
    def __init__(self, width=WIDTH, hidden=WIDTH):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x):
        return self.layers(x)


class Residual(nn.Module):
    """norm(x + sum of branches), each behind a LayerNorm."""

    def __init__(self, depth):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(depth))
        self.branches = nn.ModuleList(MLP() for _ in range(depth))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x):
        for norm, branch in zip(self.norms, self.branches, strict=True):
            x = x + branch(x=norm(x))
        return self.norm(x)

    def scaler(self, **options):
        branches = [Branch(str(i), branch) for i, branch in enumerate(self.branches)]
        return BlockGradientScaler(self, branches, **options)


def test_wrong_branches_are_refused():
    torch.manual_seed(0)
    net = Residual(2)
    net.branches[1].layers[0].weight = net.branches[0].layers[0].weight
    with pytest.raises(ValueError, match=r"one branch each, got 1's in another branch"):
        net.scaler()
    with pytest.raises(ValueError, match=r"one branch each, got out's in no part of the module"):
        BlockGradientScaler(Residual(1), [Branch("out", nn.Linear(2, 2))])
    net = Residual(2)
    net.scaler()
    with pytest.raises(ValueError, match="scaled once, got 0, which is already"):
        net.scaler()


@torch.no_grad()
def test_without_gradients_nothing_is_rounded():
    torch.manual_seed(0)
    net, x = Residual(2), torch.randn(3, WIDTH)
    expected = net(x)
    net.scaler()
    assert torch.equal(net(x), expected)
    with torch.enable_grad():
        assert 0 < (net(x) - expected).abs().max() < 0.01


def test_a_copy_runs_its_own_weights():
    """As the average does that Trainer judges."""
    net = Residual(2)
    net.scaler()
    copied = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in copied.branches.parameters():
            parameter.zero_()
        x = torch.randn(3, WIDTH)
        assert torch.equal(copied(x), copied.norm(x))


# ---- the rule


class Run:
    """A network of three branches in training, of which an update can be spoilt."""

    def __init__(self, **options):
        torch.manual_seed(0)
        self.net = Residual(3)
        self.scaler = self.net.scaler(**options)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-3, fused=True)
        self.x, self.y = torch.randn(16, WIDTH), torch.randn(16, WIDTH)

    def update(self, spoil=(), value=float("inf"), clip=1.0):
        F.mse_loss(self.net(self.x), self.y).backward()
        for i in spoil:
            self.net.branches[i].layers[2].weight.grad[3, 2] = value
        self.scaler.step(self.optimizer, clip)
        self.scaler.update()
        self.optimizer.zero_grad()

    def clean(self, times, spoilt=()):
        """Updates as they appear to the rule, without a network."""
        for _ in range(times):
            for parameter in self.net.parameters():
                parameter.grad = torch.zeros_like(parameter)
            for i in spoilt:
                self.net.branches[i].layers[0].bias.grad[0] = float("nan")
            self.scaler.unscale_()
            self.scaler.update()

    def everything(self):
        values = [*self.net.parameters()]
        values += [v for one in self.optimizer.state.values() for v in one.values()]
        return [v.detach().clone() for v in values]


def test_a_thousand_clean_updates_double_a_scale():
    run = Run(world_size=3)
    assert run.scaler.scales.tolist() == [3 * 2.0**13] * 3
    run.clean(1)
    assert run.scaler.scales.tolist() == pytest.approx([3 * 2.0**13 * 2 ** (1 / 1000)] * 3, rel=1e-7)
    run.clean(999)
    assert run.scaler.scales.tolist() == [3 * 2.0**14] * 3


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_overflow_in_one_branch(value):
    """Its scale falls, nothing is learned, and the others' scales rise."""
    run = Run()
    run.update()
    before = run.everything()
    run.update(spoil=[1], value=value)
    rises, falls = 2.0 ** (13 + 2 / 1000), 2.0 ** (13 + 1 / 1000 - 1 / 2)
    assert run.scaler.scales.tolist() == pytest.approx([rises, falls, rises], rel=1e-7)
    assert int(run.scaler.skipped) == 1
    assert all(torch.equal(a, b) for a, b in zip(before, run.everything(), strict=True))
    run.update()
    assert not any(torch.equal(a, b) for a, b in zip(before, run.everything(), strict=True))
    assert int(run.scaler.skipped) == 1


def test_overflow_ends_at_the_entrance():
    """A gradient that is too large for float16 under one branch's scale is no other's trouble."""
    run = Run()
    state = run.scaler.state_dict()
    state["exponents"].copy_(torch.tensor([7_000, 24_000, 7_000]))
    run.scaler.load_state_dict(state)
    (F.mse_loss(run.net(run.x), run.y) * 100).backward()
    bad = {name for name, p in run.net.named_parameters() if not p.grad.isfinite().all()}
    assert "branches.1.layers.2.weight" in bad and all(name.startswith("branches.1.") for name in bad)
    run.scaler.unscale_()
    run.scaler.update()
    exponents = run.scaler.state_dict()["exponents"]
    assert exponents.tolist() == [7_001, 23_500, 7_001]


def test_overflow_of_the_first_update():
    run = Run()
    before = [p.detach().clone() for p in run.net.parameters()]
    run.update(spoil=[0, 2])
    assert all(torch.equal(a, b) for a, b in zip(before, run.net.parameters(), strict=True))
    assert all(not v.any() for one in run.optimizer.state.values() for v in one.values())


def test_overflow_outside_of_branches_skips_and_lowers_nothing():
    run = Run()
    before = run.everything()
    F.mse_loss(run.net(run.x), run.y).backward()
    run.net.norm.weight.grad[0] = float("nan")
    norm, nonfinite = run.scaler.unscale_()
    assert nonfinite and not norm.isfinite()
    run.scaler.step(run.optimizer, 1.0)
    run.scaler.update()
    assert run.scaler.scales.tolist() == pytest.approx([2.0 ** (13 + 1 / 1000)] * 3)
    assert all(torch.equal(a, b) for a, b in zip(before, run.everything(), strict=False))


def test_a_scale_falls_once_in_125_updates():
    run = Run()
    run.clean(1, spoilt=[0])
    fallen = 2.0**12.5
    for later in range(1, 125):  # other scales fall whenever it is their turn
        run.clean(1, spoilt=[0, 2] if later == 60 else [0])
        assert float(run.scaler.scales[0]) == pytest.approx(fallen, rel=1e-7), later
    assert float(run.scaler.scales[2]) == pytest.approx(2.0 ** (13 + 124 / 1000 - 1 / 2), rel=1e-7)
    run.clean(1, spoilt=[0])
    assert float(run.scaler.scales[0]) == 2.0**12
    run.clean(1)
    assert float(run.scaler.scales[0]) == pytest.approx(2.0 ** (12 + 1 / 1000), rel=1e-7)


@pytest.mark.parametrize(("exponent", "spoilt", "expected"), [(7_300, [0], 2.0**7), (24_000, [], 2.0**24)])
def test_scales_stay_in_their_range(exponent, spoilt, expected):
    run = Run(world_size=5)
    state = run.scaler.state_dict()
    state["exponents"].fill_(exponent)
    run.scaler.load_state_dict(state)
    run.clean(1, spoilt)
    assert float(run.scaler.scales[0]) == 5 * expected


def test_scales_without_gradients_stay():
    run = Run()
    for parameter in run.net.branches[:2].parameters():
        parameter.grad = torch.ones_like(parameter)
    run.scaler.unscale_()
    run.scaler.update()
    assert run.scaler.scales.tolist() == pytest.approx([2.0**13.001, 2.0**13.001, 2.0**13], rel=1e-7)
    run.clean(1)  # and what follows from the present gradients is found anew
    assert run.scaler.scales.tolist() == pytest.approx([2.0**13.002, 2.0**13.002, 2.0**13.001], rel=1e-7)


def test_clipping_is_that_of_torch():
    run, plain = Run(dtype=torch.float32), Run(dtype=torch.float32)
    plain.scaler.remove()
    for _ in range(3):
        run.update(clip=0.05)
        F.mse_loss(plain.net(plain.x), plain.y).backward()
        assert nn.utils.clip_grad_norm_(plain.net.parameters(), 0.05) > 0.1
        plain.optimizer.step()
        plain.optimizer.zero_grad()
    for name in ("exp_avg", "exp_avg_sq"):
        for p, q in zip(run.net.parameters(), plain.net.parameters(), strict=True):
            torch.testing.assert_close(
                run.optimizer.state[p][name], plain.optimizer.state[q][name], rtol=1e-4, atol=1e-9
            )


def test_misuse_is_named():
    run = Run()
    with pytest.raises(RuntimeError, match="expected unscale_ or step before it"):
        run.scaler.update()
    with pytest.raises(ValueError, match="one of torch's with fused=True, that can skip an update, got SGD"):
        run.scaler.step(torch.optim.SGD(run.net.parameters()), 1.0)
    state = run.scaler.state_dict()
    with pytest.raises(ValueError, match=r"expected torch.float16 or torch.float32, got torch.bfloat16"):
        Run(dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"parameters that train in torch.float32, got torch.float16"):
        Residual(1).half().scaler()
    with pytest.raises(ValueError, match=r"expected these 2 branches, got others: \['2'\]"):
        Residual(2).scaler().load_state_dict(state)


def test_resumed_is_bit_for_bit_the_same(tmp_path):
    def go(run, steps):
        for i in steps:
            run.update(spoil=[1] if i in (2, 6, 9) else [2] if i == 4 else [])

    whole = Run()
    go(whole, range(12))
    killed = Run()
    go(killed, range(5))
    parts = {"model": killed.net, "optimizer": killed.optimizer, "scaler": killed.scaler}
    write_state(tmp_path / "state.pt", {key: part.state_dict() for key, part in parts.items()})
    go(killed, range(1))  # which the written state must not see
    resumed, state = Run(), read_state(tmp_path / "state.pt")
    for key, part in {"model": resumed.net, "optimizer": resumed.optimizer, "scaler": resumed.scaler}.items():
        part.load_state_dict(state[key])
    go(resumed, range(5, 12))
    assert all(torch.equal(a, b) for a, b in zip(whole.everything(), resumed.everything(), strict=True))
    assert torch.equal(whole.scaler.scales, resumed.scaler.scales) and int(resumed.scaler.skipped) == 4
    states = whole.scaler.state_dict(), resumed.scaler.state_dict()
    assert torch.equal(states[0]["since"], states[1]["since"])


PROCESS = """
import torch
from torch import distributed as dist, nn
from kolors_fast.training.gradient_scaling import BlockGradientScaler, Branch

dist.init_process_group("gloo", "file://FILE", rank=RANK, world_size=2)
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
scaler = BlockGradientScaler(net, [Branch(str(i), part) for i, part in enumerate(net)])
optimizer = torch.optim.AdamW(net.parameters(), fused=True)
before = net[0].weight.detach().clone()
net(torch.randn(2, 4)).square().mean().backward()
if dist.get_rank() == 1:
    net[0].bias.grad[0] = float("inf")
scaler.step(optimizer, 1.0)
scaler.update()
assert torch.equal(before, net[0].weight)
assert scaler.state_dict()["exponents"].tolist() == [12500, 13001], scaler.scales
assert scaler.skipped == 1
dist.destroy_process_group()
"""


def test_processes_agree(tmp_path):
    """Of two, one finds an overflow."""
    texts = [PROCESS.replace("FILE", str(tmp_path / "meet")).replace("RANK", str(rank)) for rank in range(2)]
    running = [subprocess.Popen([sys.executable, "-c", text], stderr=subprocess.PIPE, text=True) for text in texts]
    for process in running:
        errors = process.communicate(timeout=100)[1]
        assert process.returncode == 0, errors


# ---- where one scale for all does not do

DEPTH, PART, BATCH, STEPS = 8, 4, 32, 200
WEIGHTS = 2.0 ** (11 - 6 * torch.arange(DEPTH))


class Spread(nn.Module):
    """A residual network whose branch i answers for part i of the output alone, of which errors weigh WEIGHTS[i].

    So gradients fall by 2^42 from branch to branch, which fp32 and Adam do not mind: every part is learned as well.
    float16's range is 2^40, and a gradient's values and the noise in them take some of it.
    """

    def __init__(self):
        super().__init__()
        width = DEPTH * PART
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(DEPTH))
        self.branches = nn.ModuleList(MLP(width, 16) for _ in range(DEPTH))
        self.register_buffer("parts", torch.eye(DEPTH).repeat_interleave(PART, dim=1))

    def forward(self, x):
        for part, norm, branch in zip(self.parts, self.norms, self.branches, strict=True):
            x = x + part * branch(norm(x))
        return x

    def errors(self, x, y):
        """The mean squared error of each part."""
        return (self(x) - y).square().unflatten(1, (DEPTH, PART)).mean((0, 2))


def learn(update, *, global_half=False):
    """The errors after training from noisy examples by `update(network, optimizer)(loss)`, against the true answers."""
    torch.manual_seed(0)
    net = Spread()
    x = torch.randn(BATCH, DEPTH * PART)
    y = x + torch.tanh(x @ torch.randn(DEPTH * PART, DEPTH * PART) / (DEPTH * PART) ** 0.5)
    optimizer = torch.optim.AdamW(net.parameters(), eps=1e-25, weight_decay=0.0, fused=True)
    update = update(net, optimizer)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / STEPS)
        with torch.autocast("cpu", torch.float16, enabled=global_half):
            errors = net.errors(x, y + 0.3 * torch.randn_like(y))
        update((errors * WEIGHTS).mean())
        optimizer.zero_grad()
    with torch.no_grad():
        return net.errors(x, y)


def never(net, optimizer):
    return lambda loss: None


def plainly(net, optimizer):
    def update(loss):
        loss.backward()
        optimizer.step()

    return update


def by_block(net, optimizer):
    scaler = BlockGradientScaler(net, [Branch(str(i), branch) for i, branch in enumerate(net.branches)])

    def update(loss):
        loss.backward()
        scaler.step(optimizer, 1e9)
        scaler.update()

    return update


def by_one(constant=None):
    """One scale for the loss, as torch has it: a constant one, or one that grows until gradients overflow."""

    def of(net, optimizer):
        scaler = torch.amp.GradScaler("cpu", init_scale=constant or 2.0**16, growth_interval=5)

        def update(loss):
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update(constant)

        return update

    return of


def test_where_one_scale_for_all_loses_blocks(monkeypatch):
    monkeypatch.setattr(gradient_scaling, "RISE", 100)  # the paper's rule, impatient: scales rise by 2^(1/10),
    monkeypatch.setattr(gradient_scaling, "PATIENCE", 5)  # and may fall as often
    untrained = learn(never)
    assert (learn(plainly) / untrained).max() < 0.02
    assert (learn(by_block) / untrained).max() < 0.04
    for constant in (None, 2.0**4, 2.0**8, 2.0**12):  # a smaller one loses more of them, a larger one all
        assert (learn(by_one(constant), global_half=True) / untrained).max() > 0.99
