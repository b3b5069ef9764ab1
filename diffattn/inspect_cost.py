"""What a forward costs, operator by operator, on the meta device: an estimate of time, and what attention saw.

An operator takes the longer of its floating-point operations at the rate of the GPU and of its bytes (every tensor
read and written once) at the rate of its memory; operators follow each other without a gap. The rates were measured
on one H100 80GB.
"""

import math
from collections import defaultdict

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from diffattn.cores import AttentionCore

BANDWIDTH = 3.0e12  # bytes per second of a copy
MATMUL = {torch.float32: 49e12}  # FLOP per second; every dtype that is not listed:
MATMUL_16 = 723e12
SOFTMAX = 450e12  # of fused softmax attention at head dim 64 to 128 in 16 bits

ALLOCATIONS = ("empty", "new_empty", "empty_like", "_unsafe_view")


class Layers:
    """Which attention layer is running, what it saw and what each took. Key None is all that is in none.

    paths: names of layers -> of their modules in the model, which are looked up when it is entered: a layer may be a
    module that is swapped itself.
    """

    def __init__(self, model: nn.Module, paths: dict[str, str]):
        self.model, self.paths = model, paths
        self.running: list[str] = []
        self.seconds: dict[str | None, float] = defaultdict(float)
        self.fused: dict[str | None, float] = defaultdict(float)  # in calls of fused softmax attention
        self.seen: dict[str, list[tuple[int, int, int, int]]] = defaultdict(list)  # heads, head dim, N, M

    def __enter__(self) -> "Layers":
        self._handles = []
        for name, path in self.paths.items():
            module = self.model.get_submodule(path)
            enter = module.register_forward_pre_hook(lambda *_, name=name: self.running.append(name))
            leave = module.register_forward_hook(lambda *_: void(self.running.pop()))
            self._handles += [enter, leave]
        self._modes = _FusedAttention(self), _Costs(self)
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)
        for handle in self._handles:
            handle.remove()

    @property
    def now(self) -> str | None:
        return self.running[-1] if self.running else None

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


class _Costs(TorchDispatchMode):
    def __init__(self, layers: Layers):
        super().__init__()
        self.layers = layers

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view and func._overloadpacket.__name__ not in ALLOCATIONS:
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
            formula = flop_registry.get(func._overloadpacket)
            flops = formula(*args, **(kwargs or {}), out_val=out) if formula else 0
            dtype = tensors[0].dtype if tensors else None
            seconds = max(sum(map(nbytes, tensors)) / BANDWIDTH, flops / MATMUL.get(dtype, MATMUL_16))
            self.layers.seconds[self.layers.now] += seconds
        return out


class _FusedAttention(TorchFunctionMode):
    """Fused attention as one operator: on the meta device torch would write out the N x M weights."""

    def __init__(self, layers: Layers):
        super().__init__()
        self.layers = layers

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        q, k, v = (args[i] if i < len(args) else kwargs[n] for i, n in enumerate(("query", "key", "value")))
        out = q.new_empty((*q.shape[:-1], v.shape[-1]))
        flops = 2 * math.prod(q.shape[:-1]) * k.shape[-2] * (q.shape[-1] + v.shape[-1])
        rate = SOFTMAX if q.dtype.itemsize == 2 else MATMUL.get(q.dtype, MATMUL_16)
        seconds = max(flops / rate, sum(map(nbytes, (q, k, v, out))) / BANDWIDTH)
        now = self.layers.now
        self.layers.seconds[now] += seconds
        self.layers.fused[now] += seconds
        if now is not None:
            heads = q.shape[1] if q.dim() == 4 else 1
            self.layers.seen[now].append((heads, q.shape[-1], q.shape[-2], k.shape[-2]))
        return out


class SeeingCore(AttentionCore):
    """Does nothing but look: what a layer takes with it is what it takes without attention."""

    rotates_first = True

    def __init__(self, layers: Layers):
        super().__init__()
        self.layers = layers

    def forward(self, q, k, v, *, mask=None, scale=None, rotate=None):
        self.layers.seen[self.layers.now].append((q.shape[2], q.shape[3], q.shape[1], k.shape[1]))
        return q.new_empty((*q.shape[:3], v.shape[3]))

    def config(self):
        return {}


def nbytes(tensor: Tensor) -> int:
    """Bytes of what is stored: an expanded dimension counts once."""
    kept = (n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return math.prod(kept) * tensor.dtype.itemsize


def void(_) -> None:
    """A forward hook that returns something replaces the output."""
