"""Launchers of the Triton kernels: block sizes and scratch memory."""

import torch

from diffattn.kernels._backend import small_shared_memory
from diffattn.kernels._launch import PARTS, Launch, aligned, cdiv, on_device, padded, rotary_tables
from diffattn.kernels.frame_delta_rule.triton_frames import (
    frame_delta_rule_output_kernel,
    frame_delta_rule_products_kernel,
    frame_delta_rule_scan_kernel,
)
from diffattn.kernels.linear_attention.launches import STATE_BLOCK, choose_launch
from diffattn.kernels.linear_attention.triton import output_parts


def _products_launch(width: int, dtype: torch.dtype, small: bool) -> Launch:
    """Of `frame_delta_rule_products_kernel`, by the padded width of its tiles."""
    launch = Launch(64, 4 if width <= 64 else 8, 2, 1)
    if dtype != torch.bfloat16 or small:
        launch = launch._replace(block=32)
    if dtype == torch.float32:
        launch = launch._replace(stages=1)
    return launch


def _scan_launch(dtype: torch.dtype, small: bool) -> Launch:
    """Of `frame_delta_rule_scan_kernel`; its block is columns of a state."""
    return Launch(16, 8, 1, 1) if dtype == torch.float32 or small else Launch(32, 8, 2, 1)


def frame_delta_rule_fwd(q, k, v, beta, kept, cos, sin, normalize, scale, eps):
    """o (B, N, H, E), of heads of up to 128 features."""
    B, N, H, D = q.shape
    E, T = v.shape[3], kept.shape[1]
    S, frames, size = N // T, B * T * H, D * E + D
    o = torch.empty(B, N, H, E, dtype=q.dtype, device=q.device)
    if o.numel() == 0:
        return o
    BD, width = padded(D), max(padded(D), padded(E))
    parts, small = PARTS[q.dtype], small_shared_memory(q.device)
    rotary, tables, table_strides = 0, (q, q), (0, 0, 0)
    if cos is not None:
        tables, table_strides = rotary_tables(cos, sin)
        rotary = aligned(tables[0])
    # plain keys, which the normalizer sums, have a W of their own where those of S are rotated
    apart = normalize and rotary > 0

    def scratch(*shape):
        return torch.empty(shape, dtype=torch.float32, device=q.device)

    W, Y, X = scratch(1 + apart, frames, D * D), scratch(frames, size), scratch(2, frames, size)

    def products(right, W, rotary, values=False, add=False):
        launch = _products_launch(width, q.dtype, small)
        features = right.shape[3]
        frame_delta_rule_products_kernel[(frames,)](
            k, right, beta, kept, *tables, W, Y, *k.stride(), *right.stride(), *beta.stride(), *kept.stride(),
            *table_strides, T, S, H, scale, D=D, E=features, SIZE=size, BD=BD, BE=padded(features), BN=launch.block,
            VALUES=values, SUM=add, ROTARY=rotary, ALIGN=aligned(k, right), PARTS=parts, STAGES=launch.stages,
            num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip

    with on_device(q):
        products(k, W[0], rotary, add=normalize and not apart)
        products(v, W[0], rotary, values=True)
        if apart:
            products(k, W[1], 0, add=True)
        launch = _scan_launch(q.dtype, small)
        frame_delta_rule_scan_kernel[(B * H, cdiv(E, launch.block) + normalize, 2)](
            W, Y, X, T, H, frames, D=D, E=E, BD=BD, BE=launch.block, APART=apart, PARTS=parts, STAGES=launch.stages,
            num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip

        BE = min(padded(E), STATE_BLOCK[2 if q.dtype == torch.bfloat16 else 4] // (2 if small else 1) // BD)
        launch = choose_launch("output", width, q.dtype, rotary > 0, small)
        parts = output_parts(width, q.dtype, rotary == 0)
        frame_delta_rule_output_kernel[(frames, cdiv(E, BE))](
            q, *tables, X, o, *q.stride(), *table_strides, T, S, H, frames, eps if normalize else 1.0,
            D=D, E=E, BD=BD, BE=BE, BN=launch.block, NORM=normalize, ROTARY=rotary, ALIGN=aligned(q), PARTS=parts,
            STAGES=launch.stages, num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip
    return o
