"""Whatever comes in, the public functions return what they promise or name the argument that is wrong."""

import re

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffattn.kernels import gqa_attention, linear_attention

DTYPES = st.sampled_from([torch.float32, torch.float16, torch.float64, torch.int64])


@st.composite
def tensors(draw):
    """q, k, v that fit each other, often with one of their sizes, dtypes or numbers of axes changed."""
    B, N, M, kv_heads, groups, D, E = (draw(st.integers(1, 3)) for _ in range(7))
    shapes = [[B, N, kv_heads * groups, D], [B, M, kv_heads, D], [B, M, kv_heads, E]]
    dtypes = [torch.float32] * 3
    for _ in range(draw(st.integers(0, 2))):
        which, axis = draw(st.integers(0, 2)), draw(st.integers(0, 3))
        change = draw(st.sampled_from(["size", "dtype", "axes"]))
        if change == "size":
            shapes[which][min(axis, len(shapes[which]) - 1)] = draw(st.integers(0, 4))
        elif change == "dtype":
            dtypes[which] = draw(DTYPES)
        else:
            shapes[which] = [*shapes[which], 1] if draw(st.booleans()) else shapes[which][1:]
    return [torch.ones(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]


def returns_or_names_the_argument(function, q, k, v, **options):
    try:
        out = function(q, k, v, **options)
    except (ValueError, TypeError) as error:
        assert re.match(r"(q|k|v|mask|scale|eps|rotary|feature_map|normalizer)\b.*:", str(error)), error
    else:
        assert out.shape == (*q.shape[:3], v.shape[3]) and out.dtype == q.dtype
        assert k.shape[1] == v.shape[1] and q.shape[2] % k.shape[2] == 0
        assert out.isfinite().all()


@settings(max_examples=200, deadline=None)
@given(tensors(), st.sampled_from(["relu", "elu1", "softmax", None, "gelu"]))
def test_linear_attention(qkv, feature_map):
    returns_or_names_the_argument(linear_attention, *qkv, feature_map=feature_map)


@settings(max_examples=200, deadline=None)
@given(tensors(), st.none() | st.lists(st.integers(1, 3), max_size=5), DTYPES | st.just(torch.bool))
def test_gqa_attention(qkv, mask_shape, mask_dtype):
    mask = None if mask_shape is None else torch.ones(mask_shape, dtype=mask_dtype)
    returns_or_names_the_argument(gqa_attention, *qkv, mask=mask)
