"""diffattn's processors in a graph of OneFlow 0.9.0, on a CPU; run by check_oneflow.sh, which makes the environment.

OneDiff turns a diffusers pipeline into OneFlow's by importing its classes again with `torch` replaced by `oneflow`,
and calls `forward` of what are modules: a class with `__call__` alone ends in NotImplementedError. This does the same
to diffattn, with a stand-in for the parts of torch that OneFlow lacks, and runs each processor eagerly and in a graph.
"""

import importlib.abc
import importlib.util
import sys
import types

import oneflow as flow
import oneflow.nn as nn


class Lacking(types.ModuleType):
    """What OneFlow has no counterpart of (torch.library, torch.compiler): importing it works, asking it is False."""

    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Lacking(f"{self.__name__}.{name}")

    def __call__(self, *args, **kwargs):
        return args[0] if len(args) == 1 and isinstance(args[0], types.FunctionType) else self

    def __bool__(self):
        return False

    def __or__(self, other):
        return other

    __ror__ = __or__


class Torch(types.ModuleType):
    """A module of torch with the attributes of OneFlow's."""

    __path__ = ()

    def __init__(self, name, source):
        super().__init__(name)
        self.source = source

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        found = getattr(self.source, name, None)
        if isinstance(found, types.ModuleType):
            return importlib.import_module(f"{self.__name__}.{name}")
        return Lacking(f"{self.__name__}.{name}") if found is None else found


class Importer(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_loader(name, self) if name.split(".")[0] == "torch" else None

    def create_module(self, spec):
        source = flow
        for part in spec.name.split(".")[1:]:
            source = getattr(source, part, None)
        return Torch(spec.name, source) if isinstance(source, types.ModuleType) else Lacking(spec.name)

    def exec_module(self, module):
        pass


def stand_in():
    """What OneFlow 0.9.0 lacks and diffattn needs; OneDiff's own patches to OneFlow are of this kind."""
    sys.meta_path.insert(0, Importer())
    import torch

    def unflatten(x, dim, sizes):
        dim %= x.dim()
        return x.reshape(*x.shape[:dim], *sizes, *x.shape[dim + 1 :])

    flow.Tensor.unflatten = unflatten
    torch.is_autocast_enabled = lambda *_: False
    # As in an export to ONNX: the reference in standard operators, not torch's fused attention.
    importlib.import_module("torch.onnx").is_in_onnx_export = lambda: True


class Layer(nn.Module):
    """The parts of diffusers' Attention that processors ask for."""

    def __init__(self, processor, kv_heads=4, norms=False):
        super().__init__()
        self.heads, self.scale, self.scale_qk = 4, 8**-0.5, True
        self.spatial_norm = self.group_norm = None
        self.norm_cross = self.is_cross_attention = self.residual_connection = self.fused_projections = False
        self.rescale_output_factor = 1.0
        self.norm_q = nn.LayerNorm(32) if norms else None
        self.norm_k = nn.LayerNorm(32) if norms else None
        self.to_q, self.to_k, self.to_v = (nn.Linear(32, 8 * h) for h in (4, kv_heads, kv_heads))
        self.to_out = nn.ModuleList([nn.Linear(32, 32), nn.Dropout(0.0)])
        self.processor = processor

    def forward(self, x):
        return self.processor(self, x)


class Graph(nn.Graph):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def build(self, x):
        return self.module(x)


def attempt(module, x, graph: bool):
    try:
        return Graph(module)(x) if graph else module(x)
    except Exception as error:
        return error


def main() -> int:
    stand_in()
    from diffattn.cores import GroupedQueryAttention, LinearAttention
    from diffattn.processors.plain import PlainAttnProcessor
    from diffattn.processors.sana import SanaAttnProcessor

    class CallOnly(nn.Module):
        def __call__(self, attn, hidden_states):
            return PlainAttnProcessor.attend(self, attn, hidden_states, None, None)

        def core_for(self, context):
            return LinearAttention("relu")

    cases = {
        "a module with __call__ alone": (Layer(CallOnly()), False),
        "PlainAttnProcessor, LinearAttention('relu')": (Layer(PlainAttnProcessor(LinearAttention("relu"))), True),
        "PlainAttnProcessor, LinearAttention('elu1')": (Layer(PlainAttnProcessor(LinearAttention("elu1"))), True),
        "PlainAttnProcessor, 1 key/value head": (Layer(PlainAttnProcessor(GroupedQueryAttention()), 1), True),
        "PlainAttnProcessor, pooled to 1 head": (Layer(PlainAttnProcessor(GroupedQueryAttention(kv_heads=1))), True),
        "SanaAttnProcessor": (Layer(SanaAttnProcessor(LinearAttention("relu")), norms=True), True),
    }
    failed = 0
    for name, (layer, works) in cases.items():
        x = flow.randn(2, 6, 32)
        eager, graph = attempt(layer, x, False), attempt(layer, x, True)
        if isinstance(eager, Exception) or isinstance(graph, Exception):
            said = f"eager {type(eager).__name__}, graph {type(graph).__name__}: {str(graph).strip()[:200]}"
            as_expected = not works and isinstance(graph, NotImplementedError)
        else:
            difference = (eager - graph).abs().max().item()
            said, as_expected = f"graph differs from eager by {difference:.0e}", works and difference <= 1e-5
        failed += not as_expected
        print(f"{'as expected' if as_expected else 'WRONG':12} {name}: {said}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
