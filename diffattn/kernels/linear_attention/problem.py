"""What calls of linear attention with tensors of the same layouts share."""

import functools
import math
from collections.abc import Callable

import torch

from diffattn._config import config
from diffattn.kernels._autotune import size_class, tuned
from diffattn.kernels._backend import small_shared_memory
from diffattn.kernels._launch import PARTS, Launch, alignment, cdiv, padded, rotary_tables
from diffattn.kernels.linear_attention.launches import PACKED_WIDTH, STATE_BLOCK, choose_launch, cut, other_launches


class Problem:
    """What calls with tensors of the same layouts share: how their tiles are made, and the launches made so far.

    Args:
        q, k, v: (shape, strides) of each.
        tables: None, or (alignment, strides of samples, tokens and features, whether samples differ, dtype) of cos and
            sin.
        packs: whether heads may share tiles.
    """

    def __init__(self, device, dtype, q, k, v, tables, feature_map, packs):
        self.device, self.dtype = device, dtype
        self.q, self.k, self.v = q, k, v
        (self.B, self.N, self.H, self.D), (_, self.M, self.Hkv, self.E) = q[0], v[0]
        BD = padded(self.D)
        self.width = max(BD, padded(self.E))
        state_block = STATE_BLOCK[2 if dtype == torch.bfloat16 else 4] // (2 if small_shared_memory(device) else 1)
        BE = min(padded(self.E), state_block // BD)
        self.e_blocks = cdiv(self.E, BE)
        self.state_size = self.D * self.E + self.D
        self.softmax = feature_map == "softmax"
        self.parts = PARTS[dtype]
        # ROTARY: 0 for none, else the alignment of cos and sin
        rotary, self.table_strides, varies, _ = tables or (0, (0, 0, 0), False, None)
        # phi(q) and phi(k), as they are multiplied, have the bits of q and k
        self.raw = feature_map in ("relu", None) and not rotary
        self.constants = dict(D=self.D, E=self.E, BD=BD, BE=BE, MAP=feature_map, ROTARY=rotary)
        self.pack = 1
        if self.D == self.E == BD <= PACKED_WIDTH // 2 and self.H == self.Hkv and not self.softmax and not rotary:
            self.pack = math.gcd(PACKED_WIDTH // BD, self.H) if packs else 1
        self.packed_width = self.width * self.pack
        packed = {"PACK": self.pack} | ({} if self.pack == 1 else {"BD": self.packed_width, "BE": self.packed_width})
        # whether the forward takes the kernels of triton_pieces.py
        self.in_pieces = not self.softmax and (self.width > 64 or rotary > 0)
        # its narrowest tile: see `pieces`
        self.least = min(64, self.width)
        # samples apart in what `turns` makes
        self.turns_stride = self.N * self.D if varies else 0
        # the forward kernels' constants: heads share tiles
        self.packed = self.constants | packed
        self.ready: dict = {}

    def turns(self, q, cos, sin):
        """The rotary tables side by side, see triton_pieces.py; without tables, something."""
        if not self.constants["ROTARY"]:
            return q
        # written in place: torch.stack, and rounding its result, take longer
        turns = cos.new_empty(*cos.shape, 2, dtype=torch.float16 if self.dtype == torch.bfloat16 else None)
        turns[..., 0], turns[..., 1] = cos, sin
        return turns

    def run(
        self,
        kernel: str,
        prepare: Callable[[Launch, int, int], tuple],
        go: Callable,
        tokens: int,
        heads: int,
        e_blocks: int = 1,
        width: int = 0,
        variant: tuple = (),
    ):
        """go(*prepare(launch, chunk, n_chunks)) with the table's launch, or the fastest where a search is asked for.

        What `prepare` makes of a launch is kept for later calls; `variant` is what it depends on beside the kernel.
        """
        if not config.autotune and (kernel, variant) in self.ready:
            return go(*self.ready[kernel, variant])
        rotary = self.constants["ROTARY"] > 0 and not kernel.startswith("rotary")
        programs = self.B * heads * e_blocks

        def prepared(launch):
            return prepare(launch, *cut(launch, self.device, tokens, programs))

        launch = choose_launch(kernel, width or self.width, self.dtype, rotary, small_shared_memory(self.device))
        if config.autotune:
            problem = (self.D, self.E, self.pack, str(self.constants["MAP"]), rotary, str(self.dtype))
            key = (*problem, size_class(tokens), size_class(programs))
            name = f"linear_attention {kernel}"
            return go(*prepared(tuned(name, key, launch, other_launches(launch), lambda x: go(*prepared(x)))))
        self.ready[kernel, variant] = prepared(launch)
        return go(*self.ready[kernel, variant])

    def empty(self, *shape, dtype=torch.float32):
        return torch.empty(shape, device=self.device, dtype=dtype)


_problems = functools.lru_cache(maxsize=1024)(Problem)


def problem_of(q, k, v, cos, sin, feature_map, eps) -> tuple[Problem, tuple[torch.Tensor, torch.Tensor]]:
    """The problem, made once for such tensors, and the rotary tables; without, something in their place.

    A call may take the GPU microseconds, and working all of it out anew would take the CPU ten times as many.
    """
    layouts = (q.shape, q.stride()), (k.shape, k.stride()), (v.shape, v.stride())
    layout, tables = None, (q, q)
    if cos is not None:
        tables, strides = rotary_tables(cos, sin)
        cos = tables[0]
        varies = cos.ndim == 3 and cos.shape[0] > 1
        layout = alignment((cos.shape, cos.stride())), strides, varies, cos.dtype
    # with eps = 0 the 0 / 0 of one head would reach its neighbours in a tile
    return _problems(q.device, q.dtype, *layouts, layout, feature_map, eps > 0), tables
