"""What OneDiff and other graph compilers ask of a processor class, without them; tools/check_oneflow.sh asks OneFlow.

OneDiff imports a processor's class again by its name, with another package in the place of torch, converts the
attributes of the object, and compiles `type(processor).forward`.
"""

import importlib
import inspect
import types

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_flatten, tree_unflatten

import diffattn
from diffattn.layers import find_layers
from diffattn.processors import BY_STOCK_NAME, PROCESSORS
from tests.models.stock import built, copied, is_linear
from tests.models.test_layers import first_layers

EVERY = [*PROCESSORS, diffattn.LinearAttnProcessor, diffattn.MQAAttnProcessor]
# What OneDiff converts: tensors, modules, and plain values; a lambda or a partial ends in an error there.
PLAIN = (torch.Tensor, nn.Module, torch.dtype, torch.device, int, float, str, bool, type(None), types.FunctionType)
# Missing in OneFlow 0.9.0, and called here: the first two a stand-in adds (tools/check_oneflow.py), the third, which
# the softmax core calls, OneDiff replaces by a kernel of its own.
KNOWN = {"torch.Tensor.unflatten", "torch.Tensor.movedim", "torch.nn.functional.scaled_dot_product_attention"}
LACKING = KNOWN | {"torch.Tensor.mT.__get__", "torch.Tensor.mH.__get__"}


@pytest.mark.parametrize("cls", EVERY, ids=lambda cls: cls.__name__)
def test_class_is_one_that_onediff_can_transform(cls):
    assert issubclass(cls, nn.Module)
    assert inspect.isfunction(inspect.getattr_static(cls, "forward")) and cls.forward is not nn.Module.forward
    assert "<locals>" not in cls.__qualname__
    assert getattr(importlib.import_module(cls.__module__), cls.__qualname__) is cls
    processor = cls()
    assert inspect.signature(processor.__call__) == inspect.signature(processor.forward)
    kinds = {p.kind for p in inspect.signature(cls.forward).parameters.values()}
    assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD}  # no *args, which hide names
    check_attributes(processor)
    # accelerate offloads parameters of child modules alone
    assert not list(processor.named_parameters(recurse=False))


def check_attributes(module):
    for name, value in vars(module).items():
        if name in vars(nn.Module()):
            continue
        for leaf in tree_flatten(value)[0]:
            assert isinstance(leaf, PLAIN), f"{type(module).__name__}.{name} is {type(leaf).__name__}"
            assert not isinstance(leaf, types.FunctionType) or "<" not in leaf.__qualname__
    for child in module.children():
        if not type(child).__module__.startswith("torch."):
            check_attributes(child)


class Called(TorchFunctionMode):
    """Names of the functions of torch that are called."""

    def __init__(self):
        self.names = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.add(resolve_name(function) or "")
        return function(*args, **kwargs or {})


def state(module) -> dict:
    """Every attribute of a module and of its children, with what tensors hold."""
    return {
        (name, key): value.clone() if isinstance(value, torch.Tensor) else repr(value)
        for name, m in module.named_modules()
        for key, value in [*vars(m).items(), *m._parameters.items(), *m._buffers.items()]
        if key not in ("_modules", "_parameters", "_buffers")
    }


@pytest.mark.parametrize("stock_class", sorted(BY_STOCK_NAME))
def test_forward_keeps_the_contract(stock_class):
    """The same again, in training too, with no attribute made or changed; the class's own function does it alone."""
    if stock_class not in first_layers():
        pytest.skip("no default of any model")
    tiny, name = first_layers()[stock_class]
    stock = built(tiny)
    layer = next(x for x in find_layers(stock.model) if x.name == name)
    core = None if is_linear(layer) else diffattn.SoftmaxAttention()
    args, kwargs, _ = stock.calls[name]
    with diffattn.patched(stock.model, core, layers=name), torch.no_grad():
        processor, attn, given, called = layer.processor, stock.model.get_submodule(name), [], Called()
        first = () if processor is attn else (attn,)  # some stand in the module's place
        hook = processor.register_forward_pre_hook(
            lambda m, a, k: given.append(copied((a[len(first) :], k))), with_kwargs=True
        )
        with called:
            expected = tensors(attn(*copied(args), **copied(kwargs)))
        hook.remove()
        assert called.names & LACKING <= KNOWN
        before = state(processor)
        processor.train()
        check_equal(attn(*copied(args), **copied(kwargs)), expected)
        processor.eval()
        check_equal(attn(*copied(args), **copied(kwargs)), expected)
        after = state(processor)
        assert before.keys() == after.keys()
        for key, value in before.items():
            assert torch.equal(value, after[key]) if isinstance(value, torch.Tensor) else value == after[key], key
        rest, options = given[0]
        own = type(processor).forward(processor, *first, *copied(rest), **copied(options))
        check_equal(record(processor, first, rest, options), tensors(own))


def tensors(out) -> list[torch.Tensor]:
    return [t for t in tree_flatten(out)[0] if isinstance(t, torch.Tensor)]


def check_equal(ours, expected):
    for a, b in zip(tensors(ours), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def record(processor, first, rest, options):
    """The result of a graph of torch.fx, recorded from tensors without data: Python that reads data would raise.

    Not torch.fx.symbolic_trace: its proxies have no shapes, and few of stock's attentions pass it either.
    """
    leaves, tree = tree_flatten((rest, options))
    at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]

    def call(*given):
        filled = list(leaves)
        for i, t in zip(at, given, strict=True):
            filled[i] = t
        args, kwargs = tree_unflatten(filled, tree)
        return tensors(processor(*first, *args, **kwargs))

    graph = make_fx(call, tracing_mode="fake", _allow_non_fake_inputs=True)(*(leaves[i].clone() for i in at))
    return graph(*(leaves[i].clone() for i in at))
