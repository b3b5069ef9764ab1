"""torch's attention as ONNX's Attention operator (opset 23), in the form that ONNX Runtime takes."""

import torch

#: The first opset whose Attention operator shares key/value heads.
ATTENTION_OPSET = 23


def translations(opset: int | None) -> dict:
    """`custom_translation_table` for `torch.onnx.export`."""
    if opset is None or opset < ATTENTION_OPSET:
        return {}
    return {torch.ops.aten.scaled_dot_product_attention.default: _attention}


def _attention(q, k, v, mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """q (B, H, N, D), k and v (B, Hkv, M, D), which the operator reads as they are.

    torch's own translation hands over the mask as it is, and ONNX Runtime (1.32) refuses one of a single query:
    "inconsistent q_sequence_length (between attn_mask and Q)".
    """
    from onnxscript import opset23 as op

    if mask is not None:
        one = op.Constant(value_ints=[1])
        mask = op.Expand(mask, op.Concat(one, one, op.Shape(q, start=2, end=3), one, axis=0))
    out, _, _, _ = op.Attention(q, k, v, mask, scale=scale, is_causal=int(is_causal))
    return out
