"""Compile kernels for a GPU that is not there: what Triton's interpreter runs, its compiler may refuse.

python tests/kernels/compile_for_gpu.py FAMILY [90|89], without TRITON_INTERPRET; the families are at the end

90: Hopper. 89: Ada, whose shared memory is small, only what needs most of it. Prints a line a kernel; exits with 1 if
one does not compile, or needs more shared memory than the GPU has.
"""

import importlib
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource

ARCH = int(sys.argv[2]) if len(sys.argv) > 2 else 90
SHARED_MEMORY = {89: 99 * 1024, 90: 227 * 1024}[ARCH]
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.bool: "*i1", torch.int8: "*i8"}
TYPES[torch.int32] = "*i32"
failures = []
if ARCH == 89:
    # The shared memory is known before ptxas runs, which takes a quarter of the time.
    CUDABackend.make_cubin = lambda *_: b""


class Compiled:
    """Stands in for a kernel: a launch compiles it for what it is given."""

    def __init__(self, kernel):
        self.kernel, self.arg_names = kernel, kernel.arg_names

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, num_warps=4, num_stages=3, maxnreg=None, **constants):
        signature, constexprs, attrs, values = {}, {}, {}, iter(args)
        for i, name in enumerate(self.kernel.arg_names):
            value = constants[name] if name in constants else next(values)
            special = name not in (self.kernel.do_not_specialize or ())
            if name in constants or value is None or (special and type(value) is int and value == 1):
                signature[name], constexprs[(i,)] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name], attrs[(i,)] = TYPES[value.dtype], [["tt.divisibility", 16]]
            elif isinstance(value, int):
                signature[name] = "i64" if abs(value) >= 2**31 else "i32"
                if special and value % 16 == 0:
                    attrs[(i,)] = [["tt.divisibility", 16]]
            else:
                signature[name] = "fp32"
        options = dict(num_warps=num_warps, num_stages=num_stages, maxnreg=maxnreg)
        self.compile(ASTSource, signature, constexprs, attrs, **options)

    def compile(self, source, signature, constexprs, attrs, **options):
        name = self.kernel.fn.__name__
        try:
            source = source(self.kernel, signature, constexprs, attrs)
            made = triton.compile(source, target=GPUTarget("cuda", ARCH, 32), options=options)
            too_much = made.metadata.shared > SHARED_MEMORY
            problem = f"{made.metadata.shared} bytes of shared memory" if too_much else None
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        print(name, "ok" if problem is None else problem, flush=True)
        if problem is not None:
            failures.append(name)


class CompiledGluon(Compiled):
    """As `Compiled`, for a kernel in Gluon that takes tensor descriptors."""

    def launch(self, *args, num_warps=4, **constants):
        from triton.experimental.gluon._runtime import GluonASTSource

        signature, attrs, values = {}, {}, iter(args)
        for i, name in enumerate(self.kernel.arg_names):
            value = None if name in constants else next(values)
            if name in constants:
                signature[name] = "constexpr"
            elif isinstance(value, torch.Tensor):
                signature[name], attrs[(i,)] = TYPES[value.dtype], [["tt.divisibility", 16]]
            elif isinstance(value, int | float):
                signature[name] = "i32" if isinstance(value, int) else "fp32"
            else:
                signature[name] = f"tensordesc<{TYPES[value.base.dtype][1:]}{value.block_shape},{value.layout!r}>"
        self.compile(GluonASTSource, signature, constants, attrs, num_warps=num_warps)


def stand_in(module_name: str):
    module = importlib.import_module(f"diffattn.kernels.{module_name}")
    for name, value in vars(module).items():
        if name.endswith("_kernel") and hasattr(value, "arg_names"):
            setattr(module, name, Compiled(value))
    if hasattr(module, "small_shared_memory"):
        module.small_shared_memory = lambda device: ARCH == 89
    return module


def meta(*shape: int, dtype=torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def linear() -> None:
    launchers = stand_in("linear_attention.triton")
    stand_in("linear_attention.problem")
    cases = [
        (112, 112, torch.bfloat16, "softmax", True, 4099, 4099),
        (160, 160, torch.bfloat16, "relu", False, 4099, 4099),
        (64, 64, torch.bfloat16, "softmax", True, 4099, 4099),
        (112, 112, torch.bfloat16, "relu", True, 4099, 4099),
        (96, 96, torch.float16, "elu1", False, 4099, 4099),
    ]
    if ARCH == 90:
        cases = [
            (32, 32, torch.bfloat16, "relu", False, 4099, 4099),
            (64, 64, torch.bfloat16, "elu1", False, 4099, 4099),
            (40, 40, torch.bfloat16, "elu1", False, 4099, 4099),
            (96, 96, torch.bfloat16, "elu1", False, 4099, 4099),
            (112, 112, torch.bfloat16, "relu", True, 4099, 4099),
            (160, 160, torch.bfloat16, "elu1", False, 4099, 4099),
            (40, 24, torch.float16, "softmax", False, 4099, 4099),
            (16, 256, torch.float32, None, False, 4099, 4099),
            # The compiler takes a length of 1 for a constant.
            (40, 40, torch.bfloat16, "relu", False, 1, 300),
            (40, 40, torch.bfloat16, "softmax", False, 9, 1),
        ]
    for D, E, dtype, feature_map, rotated, N, M in cases:
        q, k = meta(2, N, 6, D, dtype=dtype), meta(2, M, 6, D, dtype=dtype)
        v, grad = meta(2, M, 6, E, dtype=dtype), meta(2, N, 6, E, dtype=dtype)
        angles = meta(N, D // 2, dtype=torch.float32) if rotated else None
        _, state = launchers.linear_attention_fwd(q, k, v, angles, angles, feature_map, 1e-6)
        launchers.linear_attention_bwd(grad, q, k, v, angles, angles, state, feature_map, 1e-6)
    launchers.linear_attention_inference(*(meta(2, 1000, 4, 32) for _ in range(3)), None, None, "relu", 1e-6)


def gqa() -> None:
    stand_in("gqa_attention.triton").TensorDescriptor = None
    forward, backward = stand_in("gqa_attention.triton_fwd"), stand_in("gqa_attention.triton_bwd")
    cases = [(256, torch.bfloat16, None), (128, torch.float32, None)]
    if ARCH == 90:
        cases = [(64, torch.bfloat16, None), (96, torch.float16, meta(2, 1, 1, 300, dtype=torch.bool))]
    for D, dtype, mask in cases:
        q, k, v = (meta(2, n, h, D, dtype=dtype) for n, h in ((301, 4), (300, 2), (300, 2)))
        forward.gqa_attention_fwd(q, k, v, mask, 0.1, False)
        out, stats, residual = forward.gqa_attention_fwd(q, k, v, mask, 0.1, True)
        backward.gqa_attention_bwd(out, q, k, v, mask, out, stats, out if residual is None else residual, 0.1)
        if mask is None and dtype != torch.float32:
            stand_in("gqa_attention.triton_int8").gqa_attention_int8_fwd(q, k, v, mask, 0.1)


def gqa_hopper() -> None:
    launchers = importlib.import_module("diffattn.kernels.gqa_attention.hopper")
    if launchers.gqa_attention_hopper_fwd_kernel is None:
        print("ok: this Triton has no Gluon for Hopper")
        return
    launchers.gqa_attention_hopper_fwd_kernel = CompiledGluon(launchers.gqa_attention_hopper_fwd_kernel)
    launchers._programs = lambda device: 132
    for configs in launchers.CONFIGS.values():
        width = max(most for most, c in launchers.CONFIGS.items() if c is configs)
        for config in configs:
            q, k, v = (meta(2, n, h, width) for n, h in ((301, 4), (300, 2), (300, 2)))
            launchers.hopper_fwd(q, k, v, None, 0.1, config=config)
    launchers.hopper_fwd(q, k, v, meta(2, 1, 1, 300, dtype=torch.bool), 0.1)
    scales = meta(2, 4, 304, dtype=torch.float32), meta(2, 2, 300, dtype=torch.float32)
    q, k = (meta(*x.shape, dtype=torch.int8) for x in (q, k))
    launchers.hopper_fwd(q, k, v.half(), None, 0.1, scales)


def causal() -> None:
    launchers = stand_in("causal_linear_attention.triton")
    cases = [(128, 128, torch.bfloat16, "relu", True, 3, 1)]
    if ARCH == 90:
        cases = [
            (64, 64, torch.bfloat16, "elu1", True, 3, 1),
            (40, 24, torch.float16, None, False, 4, 1),
            (112, 112, torch.bfloat16, "relu", True, 4, 1560),
        ]
    for D, E, dtype, feature_map, normalize, decay, block in cases:
        N = 4 * 1560
        q, k, v, grad = (meta(2, N, h, d, dtype=dtype) for h, d in ((4, D), (2, D), (2, E), (4, E)))
        g = None if decay is None else meta(*(2, N // block, 2, D)[:decay], dtype=torch.float32)
        state = meta(2, 2, D * E + (D if normalize else 0), dtype=torch.float32)
        options = (feature_map, normalize, 1e-6, block)
        out, *kept = launchers.causal_linear_attention_fwd(q, k, v, g, state, state, *options, True)
        launchers.causal_linear_attention_bwd(grad, state, q, k, v, g, state, state, *kept, out, *options, True)
        if launchers.recurrent_fits(D, E, normalize):
            launchers.causal_linear_attention_recurrent(q, k, v, g, state, state, *options)
    both_ways = importlib.import_module("diffattn.kernels.causal_linear_attention.triton_bidirectional")
    for D, feature_map, keep in [(128, None, False)] if ARCH == 89 else [(64, "elu1", False), (128, None, True)]:
        x, y, g = meta(2, 1024, 4, D), meta(2, 1024, 2, D), meta(2, 1024, 2, dtype=torch.float32)
        both_ways.bidirectional_linear_attention_fwd(x, y, y, g, feature_map, True, 1e-6, 1, keep)


def block_sparse() -> None:
    stand_in("gqa_attention.triton").TensorDescriptor = None
    forward = stand_in("block_sparse_attention.triton_fwd")
    backward = stand_in("block_sparse_attention.triton_bwd")
    from diffattn.kernels.block_sparse_attention import Blocks

    cases = [(256, torch.bfloat16, 300, 128, True), (128, torch.float32, 300, 128, False)]
    if ARCH == 90:
        cases = [
            (64, torch.bfloat16, 300, 64, False),
            (96, torch.float16, 300, 128, True),
            (40, torch.bfloat16, 300, 16, True),
            # The compiler takes a length of 1 for a constant, and so a number of blocks.
            (64, torch.float32, 1, 32, False),
        ]
    for D, dtype, N, size, checked in cases:
        q, k, v = (meta(2, N, h, D, dtype=dtype) for h in (4, 2, 2))
        number = -(-N // size)
        count = meta(2, 4, number, dtype=torch.int32)
        blocks = Blocks(meta(2, 4, number, number, dtype=torch.int32), count, count, size, size)
        checks = (
            (meta(3, N, dtype=torch.float32),) * 2 + (meta(2, N, dtype=torch.float32),) if checked else (None,) * 3
        )
        forward.block_sparse_attention_fwd(q, k, v, blocks, *checks, 0.1, False)
        out, stats, residual = forward.block_sparse_attention_fwd(q, k, v, blocks, *checks, 0.1, True)
        residual = stats if residual is None else residual
        backward.block_sparse_attention_bwd(out, q, k, v, blocks, *checks, out, stats, residual, 0.1)
        if not checked:
            out, total = forward.block_sparse_sum_fwd(q, k, v, blocks, 0.1)
            backward.block_sparse_sum_bwd(out, total, q, k, v, blocks, 0.1)


def frame_delta_rule() -> None:
    launchers = stand_in("frame_delta_rule.triton")
    cases = [(112, 112, torch.bfloat16, True, True, 21), (112, 112, torch.float32, True, True, 21)]
    if ARCH == 90:
        cases += [
            (112, 112, torch.bfloat16, False, False, 21),
            (40, 24, torch.float16, True, False, 3),
            # The compiler takes a length of 1 for a constant.
            (64, 64, torch.bfloat16, True, True, 1),
        ]
    for D, E, dtype, normalize, rotated, T in cases:
        N = 880 * T
        q, k, v = (meta(2, N, 4, d, dtype=dtype) for d in (D, D, E))
        angles = meta(N, D // 2, dtype=torch.float32) if rotated else None
        launchers.frame_delta_rule_fwd(q, k, v, meta(2, N, 4), meta(2, T, 4), angles, angles, normalize, 0.1, 1e-8)
    rays = stand_in("ray_encoding.triton")
    angles = meta(880, 28, dtype=torch.float32)
    for heads, limit in ((20, True), (1, False)):
        rays.ray_encoding_fwd(meta(2, 880, heads, 112), meta(2, 880, 4, 4), angles, angles, 0.1, limit)


def qk_norm_rope() -> None:
    launcher = stand_in("qk_norm_rope.triton")
    # norm across heads, R features that rotate, halves, kv heads, D
    cases = [
        (False, 96, False, 2, 96, torch.bfloat16),
        (False, 128, False, 4, 128, torch.float16),
        (False, 32, True, 4, 64, torch.bfloat16),
        (True, 112, False, 4, 112, torch.bfloat16),
        (True, 0, False, 0, 72, torch.float32),
    ]
    for across, R, halves, kv_heads, D, dtype in cases:
        q, k = meta(2, 301, 4, D, dtype=dtype), meta(2, 300, kv_heads, D, dtype=dtype) if kv_heads else None
        q_weight, k_weight = (meta(h * D if across else D, dtype=dtype) for h in (4, kv_heads))
        tables = [meta(n, R // 2, dtype=torch.float32) if R else None for n in (301, 301, 300, 300)]
        launcher.qk_norm_rope_fwd(q, k, q_weight, k_weight, 1e-6, 1e-6, *tables, halves, halves, across)


if __name__ == "__main__":
    {
        "linear": linear,
        "gqa": gqa,
        "gqa_hopper": gqa_hopper,
        "causal": causal,
        "block_sparse": block_sparse,
        "frame_delta_rule": frame_delta_rule,
        "qk_norm_rope": qk_norm_rope,
    }[sys.argv[1]]()
    sys.exit(1 if failures else 0)
