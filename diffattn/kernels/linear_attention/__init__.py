"""Linear attention: the cost of attention grows with the number of tokens, not with its square."""

import numbers

import torch

from diffattn.kernels._backend import use_triton
from diffattn.kernels._checks import check_qkv, shape_of
from diffattn.kernels.linear_attention import ops as ops  # registers the operators
from diffattn.kernels.linear_attention.reference import linear_attention_reference

__all__ = ["FEATURE_MAPS", "linear_attention", "linear_attention_reference"]

FEATURE_MAPS = ("relu", "elu1", "softmax", None)
NORMALIZERS = ("sum", "mean")
# wider heads take plain torch: their state does not fit the kernels' blocks
MAX_HEAD_DIM = 256


def linear_attention(q, k, v, *, feature_map="relu", rotary=None, eps=1e-15, normalizer="sum"):
    """Non-causal linear attention.

    o_n = (rot(phi(q_n)) S) / (phi(q_n) . z + eps),  S = sum_m rot(phi(k_m)) v_m^T,  z = sum_m phi(k_m)

    Katharopoulos et al. 2020, eq. 5, with the rotation of the numerator as in SANA-Video. A row where phi(q) is 0
    gives 0, and so does a row whose keys are all 0. Keys of -inf count as absent: phi(-inf) = 0.

    Args:
        q: (B, N, H, D), float16, bfloat16, float32 or float64, any strides.
        k: (B, M, Hkv, D), dtype of q; H is a multiple of Hkv.
        v: (B, M, Hkv, E), dtype of q.
        feature_map: phi. `"relu"`; `"elu1"`, elu(x) + 1; `"softmax"`, over the features for q and over the tokens
            for k (efficient attention, Shen et al. 2021), where phi(q) . z is 1 and `eps` and `normalizer` have no
            effect; `None`, q and k are mapped already (-inf then means nothing: write 0 for an absent key).
        rotary: `(cos, sin)`, each (N, D / 2) or (B, N, D / 2), applied to the pairs (2i, 2i + 1) of the mapped q
            and k, in the numerator alone; needs N = M. They are constants: no gradient reaches them.
        eps: added to the denominator.
        normalizer: `"sum"` as above, or `"mean"`: z is the mean over tokens and S is divided by M (LinFusion),
            which is the same but for the weight of `eps`.
    Returns: (B, N, H, E), contiguous where Triton runs, in the dtype of q. S, z and the division are float32
        (float64 for float64).
    Raises: TypeError or ValueError, naming the argument, what came and what would fit.
    """
    check_qkv(q, k, v)
    _check_options(feature_map, eps, normalizer)
    cos, sin = (None, None) if rotary is None else _check_rotary(q, k, rotary)
    if max(q.shape[3], v.shape[3]) <= MAX_HEAD_DIM and use_triton(q):
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            return torch.ops.diffattn.linear_attention(q, k, v, cos, sin, feature_map, normalizer, float(eps))[0]
        return torch.ops.diffattn.linear_attention_inference(q, k, v, cos, sin, feature_map, normalizer, float(eps))
    rotary = None if rotary is None else (cos, sin)
    return linear_attention_reference(q, k, v, feature_map=feature_map, rotary=rotary, eps=eps, normalizer=normalizer)


def _check_options(feature_map, eps, normalizer):
    if feature_map not in FEATURE_MAPS:
        raise ValueError(f"feature_map: got {feature_map!r}, expected one of {FEATURE_MAPS}")
    if normalizer not in NORMALIZERS:
        raise ValueError(f"normalizer: got {normalizer!r}, expected one of {NORMALIZERS}")
    if not isinstance(eps, numbers.Real):
        raise TypeError(f"eps: got {type(eps).__name__}, expected a number")
    if not eps >= 0:
        raise ValueError(f"eps: got {eps}, expected 0 or more")


def _check_rotary(q, k, rotary):
    if not isinstance(rotary, (tuple, list)) or len(rotary) != 2:
        raise TypeError(f"rotary: got {type(rotary).__name__}, expected a pair of tensors (cos, sin)")
    B, N, _, D = q.shape
    if D % 2 != 0:
        raise ValueError(f"rotary: q has {D} features, expected an even number: they rotate in pairs")
    if k.shape[1] != N:
        raise ValueError(f"rotary: got N = {N} queries and M = {k.shape[1]} keys, expected N = M")
    for name, x in zip(("cos", "sin"), rotary, strict=True):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"rotary: {name} is {type(x).__name__}, expected a tensor (N, D / 2) or (B, N, D / 2)")
        if not x.dtype.is_floating_point:
            raise TypeError(f"rotary: {name} is {x.dtype}, expected float32 or {q.dtype} as q")
        if x.device != q.device:
            raise ValueError(f"rotary: {name} is on {x.device}, expected {q.device} as q")
        if x.ndim not in (2, 3) or x.shape[-2] != N or x.shape[-1] != D // 2 or (x.ndim == 3 and x.shape[0] != B):
            raise ValueError(
                f"rotary: {name} has shape {shape_of(x)}, expected ({N}, {D // 2}) or ({B}, {N}, {D // 2})"
            )
    cos, sin = rotary
    if cos.shape != sin.shape or cos.dtype != sin.dtype:
        raise ValueError(
            f"rotary: cos is {cos.dtype} {shape_of(cos)} and sin {sin.dtype} {shape_of(sin)}, expected them alike"
        )
    return cos.detach(), sin.detach()
