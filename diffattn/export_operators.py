"""Operators that torch's own translations to ONNX lack or get wrong, in the form that ONNX Runtime takes."""

import torch

#: The first opset whose Attention operator shares key/value heads.
ATTENTION_OPSET = 23


def has_attention(opset: int | None) -> bool:
    """Whether attention with shared heads becomes one operator; torch's default opset has none."""
    return opset is not None and opset >= ATTENTION_OPSET


def translations(opset: int | None) -> dict:
    """`custom_translation_table` for `torch.onnx.export`."""
    aten = torch.ops.aten
    table = {
        aten.squeeze.dim: _squeeze,
        aten.sort.stable: _sort,
        aten.masked_fill.Scalar: _masked_fill,
        aten.masked_fill.Tensor: _masked_fill,
    }
    return table | ({aten.scaled_dot_product_attention.default: _attention} if has_attention(opset) else {})


def _squeeze(x, dim: int):
    """A dimension that is not 1 stays, as in torch; ONNX's operator fails there. One that is free is 2 or more."""
    from onnxscript import opset18 as op

    return op.Squeeze(x, op.Constant(value_ints=[dim])) if len(x.shape) and x.shape[dim] == 1 else op.Identity(x)


def _sort(x, stable: bool | None = None, dim: int = -1, descending: bool = False):
    """TopK puts the lower index first where values are equal, so it is stable. It takes no booleans, few integers."""
    from onnxscript import ir
    from onnxscript import opset18 as op

    taken = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.INT32, ir.DataType.INT64)
    other = ir.DataType.FLOAT if x.dtype.is_floating_point() else ir.DataType.INT64
    keys = x if x.dtype in taken else op.Cast(x, to=int(other))
    length = op.Gather(op.Shape(x), op.Constant(value_ints=[dim]))
    values, indices = op.TopK(keys, length, axis=dim, largest=int(descending))
    return op.CastLike(values, x), indices


def _masked_fill(x, mask, value):
    """ONNX Runtime chooses between numbers only, not between booleans."""
    from onnxscript import ir
    from onnxscript import opset18 as op

    if x.dtype != ir.DataType.BOOL:
        return op.Where(mask, op.CastLike(value, x), x)
    filled = op.Cast(value, to=int(ir.DataType.BOOL))
    return op.Or(op.And(mask, filled), op.And(op.Not(mask), x))


def _attention(q, k, v, mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """torch's attention as ONNX's Attention operator: q (B, H, N, D), k and v (B, Hkv, M, D), read as they are.

    torch's own translation hands over the mask as it is, and ONNX Runtime (1.32) refuses one of a single query:
    "inconsistent q_sequence_length (between attn_mask and Q)".
    """
    from onnxscript import opset23 as op

    if mask is not None:
        one = op.Constant(value_ints=[1])
        mask = op.Expand(mask, op.Concat(one, one, op.Shape(q, start=2, end=3), one, axis=0))
    out, _, _, _ = op.Attention(q, k, v, mask, scale=scale, is_causal=int(is_causal))
    return out
