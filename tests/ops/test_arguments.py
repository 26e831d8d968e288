"""What every op says to arguments that do not fit, generated from the specs: one sentence that names the argument."""

from __future__ import annotations

import re
from collections.abc import Iterator
from inspect import signature
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad

from kolors_fast.ops import SPECS, AddedStream, BackendError, OpSpec, qk_norm_attention, use_backend
from kolors_fast.ops._spec import Inputs, cast, map_tensors

ALL = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
WITH_GRADIENT = pytest.mark.parametrize("spec", [s for s in SPECS.values() if s.gradients], ids=lambda s: s.name)
WITHOUT_GRADIENT = pytest.mark.parametrize("spec", [s for s in SPECS.values() if not s.gradients], ids=lambda s: s.name)


def _inputs(spec: OpSpec, holds: str = "") -> Inputs:
    """Of the first small case, `plain` before others, that has tensors in the argument `holds`."""
    small = sorted((case for case in spec.cases if not case.model), key=lambda case: case.name != "plain")
    for case in small:
        inputs = cast(case.make(torch.Generator().manual_seed(0)), torch.float32)
        if not holds or isinstance(inputs.get(holds), (Tensor, list, tuple)):
            return inputs
    raise AssertionError(f"{spec.name}: no case has {holds}")


def _slots(spec: OpSpec) -> Iterator[tuple[str, bool, Inputs, Any]]:
    """Every tensor argument: its name, whether it may be None, the inputs of a call, and value -> inputs with it."""
    for name, parameter in signature(spec.function).parameters.items():
        if "Tensor" not in parameter.annotation and "Stream" not in parameter.annotation:
            continue
        inputs = _inputs(spec, name)
        value, optional = inputs[name], "None" in parameter.annotation
        if isinstance(value, Tensor):
            yield name, optional, inputs, lambda x, inputs=inputs, name=name: {**inputs, name: x}
            continue
        for i, item in enumerate(value):
            if isinstance(item, Tensor):
                field = f"{name}.{AddedStream._fields[i]}" if isinstance(value, tuple) else f"{name}[{i}]"

                def changed(x: Any, inputs: Inputs = inputs, name: str = name, i: int = i) -> Inputs:
                    items = [*inputs[name][:i], x, *inputs[name][i + 1 :]]
                    return {**inputs, name: items if isinstance(inputs[name], list) else tuple(items)}

                yield field, isinstance(value, tuple), inputs, changed


def _tensor_of(name: str, inputs: Inputs) -> Tensor:
    head, index, field = re.fullmatch(r"(\w+)(?:\[(\d+)\])?(?:\.(\w+))?", name).groups()  # type: ignore[union-attr]
    value = inputs[head]
    value = value if index is None else value[int(index)]
    found: Tensor = value if field is None else getattr(AddedStream(*value), field)
    return found


def _refusal(function: Any, inputs: Inputs) -> str:
    with pytest.raises((ValueError, TypeError)) as caught:
        function(**inputs)
    return str(caught.value)


@ALL
def test_every_tensor_argument_refuses_what_is_no_dense_tensor(spec: OpSpec) -> None:
    for name, optional, inputs, changed in _slots(spec):
        good = _tensor_of(name, inputs)
        bad = [1.5, good.tolist(), "x", good.numpy(), good.to_sparse(), good.to(torch.complex64)]
        bad += [] if optional else [None]
        if spec.name == "geglu_linear" and name == "weight":
            del bad[4]  # F.linear takes a sparse weight
        for value in bad:
            message = _refusal(spec.function, changed(value))
            written = re.escape(name).replace(r"\.", "[._]")
            assert re.fullmatch(rf"{spec.name}: {written}: expected .+, got .+", message), message
            assert len(message) < 200


@ALL
def test_every_tensor_argument_refuses_another_shape_dtype_or_device_in_one_sentence(spec: OpSpec) -> None:
    for name, _, inputs, changed in _slots(spec):
        good, refused = _tensor_of(name, inputs), 0
        bad = [good[None], good.to(torch.int32), good.double(), good.to("meta"), good.to(torch.float8_e4m3fn)]
        bad += [torch.cat([good, good[..., :1]], -1)] if good.dim() else []
        for value in bad:
            try:
                spec.function(**changed(value))
            except (ValueError, TypeError) as error:
                assert re.fullmatch(rf"{spec.name}: [\w.\[\]]+: expected .+, got .+", str(error)), error
                refused += 1
        # what else is refused depends on the op: one that takes a single tensor takes it on any device
        assert refused >= 2, name
        assert re.match(rf"{spec.name}: ", _refusal(spec.function, changed(good.to(torch.int32))))


@ALL
def test_numbers_that_are_none(spec: OpSpec) -> None:
    for name, parameter in signature(spec.function).parameters.items():
        kind, *others = parameter.annotation.split(" | ")
        bad: list[Any] = {
            "float": [float("nan"), -1e-3, "x", [1.0], 1j, torch.ones(2)],
            "int": [-1, 2.0, "x", None],
            "torch.dtype": ["float16", float, torch.int32],
        }.get(kind, [])
        for value in [*bad, *([None] if bad and not others else [])]:
            message = _refusal(spec.function, {**_inputs(spec), name: value})
            assert re.fullmatch(rf"{spec.name}: {name}: expected .+, got .+", message), message


@pytest.mark.parametrize("added", [1.5, "x", (), (None, None), (1, 2, 3)])
def test_an_added_stream_of_another_kind(added: Any) -> None:
    for name in ("qk_norm", "qk_norm_attention"):
        message = _refusal(SPECS[name].function, {**_inputs(SPECS[name]), "added": added})
        assert re.fullmatch(rf"{name}: added(\.q)?: expected .+, got .+", message), message


@ALL
def test_refusals_are_the_same_under_tracing(spec: OpSpec) -> None:
    """With fullgraph=True an exception that leaves the graph is torch's own, which quotes ours."""
    name, _, inputs, changed = next(_slots(spec))
    good = _tensor_of(name, inputs)
    for value in (1.5, good.to(torch.int32), good.to("meta")):
        bad = changed(value)
        try:
            spec.function(**bad)
            continue  # an op of one tensor runs on any device
        except (ValueError, TypeError) as error:
            eager = error
        torch.compiler.reset()
        with pytest.raises(type(eager), match=f"^{re.escape(str(eager))}$"):
            torch.compile(spec.function, backend="eager")(**bad)
        torch.compiler.reset()
        with pytest.raises((ValueError, TypeError, RuntimeError), match=re.escape(str(eager))):
            torch.compile(spec.function, backend="eager", fullgraph=True)(**bad)
        with FakeTensorMode() as mode, pytest.raises(type(eager), match=f"^{re.escape(str(eager))}$"):
            spec.function(**{name: map_tensors(item, mode.from_tensor) for name, item in bad.items()})


@ALL
def test_no_launcher_reads_a_fake_tensor_beside_plain_ones(spec: OpSpec) -> None:
    for name, _, inputs, changed in _slots(spec):
        fake = FakeTensorMode().from_tensor(_tensor_of(name, inputs))
        try:
            found = spec.function(**changed(fake))
        except (AssertionError, TypeError, ValueError, RuntimeError):
            continue  # torch's own refusal of fake tensors beside plain ones
        assert isinstance(found[0] if isinstance(found, tuple) else found, FakeTensor), name


@WITHOUT_GRADIENT
def test_ops_without_a_backward_pass_name_what_wants_a_gradient(spec: OpSpec) -> None:
    for name, _, inputs, changed in _slots(spec):
        good = _tensor_of(name, inputs)
        if good.is_floating_point():
            message = _refusal(spec.function, changed(good.clone().requires_grad_()))
            assert message.startswith(f"{spec.name}: {name}: expected a tensor without gradient, got requires_grad")
            with torch.no_grad():
                spec.function(**changed(good.clone().requires_grad_()))


@WITH_GRADIENT
def test_transforms_are_refused_and_never_dropped(spec: OpSpec) -> None:
    inputs = _inputs(spec)
    name = spec.gradients[0]

    def first(x: Tensor) -> Tensor:
        found = spec.function(**{**inputs, name: x})
        return found[0] if isinstance(found, tuple) else found

    with pytest.raises(TypeError, match="expected a plain tensor, got one inside"):
        torch.vmap(first)(torch.stack([inputs[name]] * 2))
    with pytest.raises((RuntimeError, TypeError), match=r"autograd\.Function|expected a plain tensor"):
        torch.func.jvp(first, (inputs[name],), (inputs[name],))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        first(forward_ad.make_dual(inputs[name], inputs[name]))


@ALL
def test_autocast_gives_the_same_dtype_in_eager_and_compiled(spec: OpSpec) -> None:
    """Those that end in torch's product or attention follow autocast, others keep the dtype of their input."""

    def run(function: Any) -> list[torch.dtype]:
        inputs = _inputs(spec)
        inputs |= {name: map_tensors(inputs[name], Tensor.clone) for name in spec.mutated}
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            found = function(**inputs)
        found = found if isinstance(found, tuple) else (found,)
        return [y.dtype for y in found if y is not None]

    torch.compiler.reset()
    assert run(torch.compile(spec.function, fullgraph=True, backend="aot_eager")) == run(spec.function)


@WITH_GRADIENT
def test_a_second_derivative_is_refused(spec: OpSpec) -> None:
    inputs = _inputs(spec)
    name = spec.gradients[0]
    x = inputs[name].clone().requires_grad_()
    found = spec.function(**{**inputs, name: x})
    y = found[0] if isinstance(found, tuple) else found
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiate twice|derivative for .* is not implemented"):
        grad.square().sum().backward()


def test_a_forced_backend_that_declines_is_a_value_error() -> None:
    with use_backend("cpu"):
        for spec in SPECS.values():
            control = {"scales": torch.ones(3).double()} if spec.name == "unscale_grads_" else {}
            inputs = cast(spec.cases[0].make(torch.Generator().manual_seed(0)), torch.float64) | control
            with pytest.raises(BackendError, match=rf"^{spec.name}: backend: expected .+, got 'cpu', .+ declines: "):
                spec.function(**inputs)
    assert issubclass(BackendError, ValueError)


@pytest.mark.parametrize(("batch", "queries"), [(0, 5), (2, 0)])
def test_attention_without_queries_has_a_gradient_of_its_key_bias(batch: int, queries: int) -> None:
    q, k = torch.zeros(batch, queries, 2, 8), torch.zeros(batch, 7, 2, 8)
    key_bias = torch.zeros(batch, 7, requires_grad=True)
    out: Any = qk_norm_attention(q, k, k, key_bias=key_bias)
    (grad,) = torch.autograd.grad(out.sum(), key_bias)
    assert out.shape == q.shape and torch.equal(grad, torch.zeros(batch, 7))
