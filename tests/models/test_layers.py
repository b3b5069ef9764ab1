"""Every attention layer of the tiny models by itself, on the arguments that its model gave it."""

import functools

import pytest
import torch
from torch.utils._pytree import tree_map

import diffattn
from diffattn.patch import find_layers
from diffattn.processors import BY_STOCK_NAME
from tests.models import MODELS
from tests.models.base import flat
from tests.models.stock import built, copied, is_softmax, layers, relative_error

PATCHABLE = [m for m in MODELS if m.unreachable != "*"]


@pytest.mark.parametrize("tiny", PATCHABLE, ids=str)
def test_each_layer_returns_what_stock_returns(tiny):
    """Layer by layer, since a residual stream may hide what a layer gets wrong."""
    stock = built(tiny)
    model = stock.model
    softmax = {layer.name for layer in find_layers(model) if layer.family and is_softmax(layer)}
    assert softmax - stock.calls.keys() == layers(model, tiny.unused) & softmax
    if not softmax or tiny.hides_queries:
        return
    with diffattn.patched(model, diffattn.SoftmaxAttention()), torch.no_grad():
        for name in softmax & stock.calls.keys():
            args, kwargs, out = stock.calls[name]
            ours = model.get_submodule(name)(*copied(args), **copied(kwargs))
            assert relative_error(flat(ours), flat(out)) <= 1e-6, name


def in_bfloat16(tree):
    return tree_map(lambda x: x.bfloat16() if isinstance(x, torch.Tensor) and x.is_floating_point() else x, tree)


@pytest.mark.parametrize("tiny", PATCHABLE, ids=str)
def test_in_bfloat16_each_layer_errs_as_little_as_stock(tiny):
    stock = built(tiny)
    names = [layer.name for layer in find_layers(stock.model) if layer.family and is_softmax(layer)]
    if not names or tiny.hides_queries:
        return
    model = tiny.model().bfloat16()
    with torch.no_grad():
        for name in names:
            if name not in stock.calls:
                continue
            attn, (args, kwargs, exact) = model.get_submodule(name), stock.calls[name]
            theirs = attn(*in_bfloat16(copied(args)), **in_bfloat16(copied(kwargs)))
            with diffattn.patched(model, diffattn.SoftmaxAttention(), layers=name):
                ours = attn(*in_bfloat16(copied(args)), **in_bfloat16(copied(kwargs)))
            assert tree_map(lambda x: x.dtype, ours) == tree_map(lambda x: x.dtype, theirs)
            error = relative_error(flat(theirs), flat(exact))
            assert relative_error(flat(ours), flat(exact)) <= 2 * error + torch.finfo(torch.bfloat16).eps / 8, name


class Seen(diffattn.SoftmaxAttention):
    """Keeps what it was told of its layer, and what it was given."""

    def prepare(self, layer):
        self.told = layer

    def forward(self, q, k, v, **options):
        self.given = q.shape[2:], k.shape[2:]
        return super().forward(q, k, v, **options)

    def formula(self, heads, kv_heads):
        return ("seen",)


@pytest.mark.filterwarnings("ignore:diffattn. .* another mechanism")
@pytest.mark.parametrize("tiny", PATCHABLE, ids=str)
def test_cores_are_told_the_shapes_that_they_get(tiny):
    """Maps and projections with weights are made of that, before the first call."""
    stock = built(tiny)
    names = [layer.name for layer in find_layers(stock.model) if layer.family and layer.name in stock.calls]
    with diffattn.patched(stock.model, Seen(), layers=lambda name, attn: name in names) as handle, torch.no_grad():
        for name, processor in handle.installed.items():
            args, kwargs, _ = stock.calls[name]
            stock.model.get_submodule(name)(*copied(args), **copied(kwargs))
            told, (q, k) = processor.core.told, processor.core.given
            assert (told.heads, told.head_dim) == tuple(q) and (told.kv_heads, told.head_dim) == tuple(k), name


@functools.cache
def first_layers():
    """One layer of each stock processor, with the core of the exact patch."""
    found = {}
    for tiny in (tiny for tiny in PATCHABLE if tiny.absent() is None):
        for layer in find_layers(built(tiny).model):
            if layer.family and layer.name in built(tiny).calls:
                found.setdefault(type(layer.stock).__name__, (tiny, layer.name))
    return found


@pytest.mark.parametrize("stock_class", sorted(BY_STOCK_NAME))
def test_each_processor_compiles_to_one_graph(stock_class):
    if stock_class not in first_layers():
        pytest.skip("no default of any model")
    tiny, name = first_layers()[stock_class]
    stock = built(tiny)
    layer = next(x for x in find_layers(stock.model) if x.name == name)
    core = diffattn.SoftmaxAttention() if is_softmax(layer) else None
    args, kwargs, out = stock.calls[name]
    torch._dynamo.reset()
    with diffattn.patched(stock.model, core, layers=name), torch.no_grad():
        # The graph is what is tested here, not the minute that inductor takes to build it.
        compiled = torch.compile(stock.model.get_submodule(name), fullgraph=True, backend="eager")
        ours = compiled(*copied(args), **copied(kwargs))
    if not tiny.hides_queries:
        assert relative_error(flat(ours), flat(out)) <= 1e-5


@pytest.mark.parametrize("tiny", PATCHABLE, ids=str)
def test_models_run_on_the_kernels(tiny, device, triton_backend):
    """Norms and rotation in one kernel, and the exact patch's core: what a GPU runs in eager inference."""
    tiny.needed()
    with torch.device(device), torch.backends.cudnn.flags(allow_tf32=False), torch.no_grad(), tiny.reference():
        model = tiny.model().to(device)

        def run():
            return tiny.run(model, torch.Generator(device).manual_seed(1))

        stock = run()
        softmax = any(layer.family and is_softmax(layer) for layer in find_layers(model))
        for core in (None, diffattn.SoftmaxAttention()) if softmax else (None,):
            with diffattn.patched(model, core):
                assert relative_error(run(), stock) <= 1e-5
