"""The moving average against its closed form."""

import pytest
import torch
from torch import nn

from kolors_fast.training.ema import EMA


def scalar(value):
    module = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(module.weight, value)
    return module


def test_constant_input_decays_the_start():
    # the parameter jumps from 1 to 0 once: the average is the product of all decays
    module = scalar(1.0)
    ema = EMA(module, 0.9)
    nn.init.zeros_(module.weight)
    expected = 1.0
    for n in range(1, 200):
        ema.update(module)
        expected *= min(0.9, (1 + n) / (10 + n))
        assert float(ema.module.weight) == pytest.approx(expected, rel=1e-12)
    assert min(0.9, 200 / 209) == 0.9  # the last updates ran at the full decay


def test_average_is_apart_from_the_module():
    module = scalar(2.0)
    ema = EMA(module, 0.5)
    with torch.no_grad():
        module.weight.fill_(4.0)
    assert float(ema.module.weight) == 2.0
    assert not ema.module.weight.requires_grad
    assert not ema.module.training
    ema.update(module)
    assert module.weight.item() == 4.0
