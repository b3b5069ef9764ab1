"""Causal and gated linear attention: a sum over the past that fits in a state of fixed size."""

import numbers

import torch
from torch import Tensor

from diffattn.kernels._backend import exporting, small_shared_memory, use_triton
from diffattn.kernels._checks import check_qkv, shape_of
from diffattn.kernels.causal_linear_attention import ops as ops  # registers the operators
from diffattn.kernels.causal_linear_attention.bidirectional import bidirectional_linear_attention
from diffattn.kernels.causal_linear_attention.reference import causal_linear_attention_reference
from diffattn.kernels.causal_linear_attention.state import LinearState, check_state

__all__ = [
    "FEATURE_MAPS",
    "FORMS",
    "LinearState",
    "bidirectional_linear_attention",
    "causal_linear_attention",
    "causal_linear_attention_reference",
]

FEATURE_MAPS = ("relu", "elu1", None)
FORMS = ("auto", "parallel", "chunkwise", "recurrent")
# wider heads take plain torch: their state does not fit the kernels' blocks
MAX_HEAD_DIM = 256
# Up to this many tokens "auto" goes one by one: a tile of the chunkwise kernel has as many rows.
RECURRENT_TOKENS = 16


def causal_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: str | None = None,
    normalize: bool = True,
    decay: Tensor | None = None,
    state: "LinearState | Tensor | None" = None,
    return_state: bool = False,
    form: str = "auto",
    block: int = 1,
    eps: float = 1e-15,
):
    """Causal linear attention with an optional decay, in its parallel, chunkwise and recurrent forms.

    S_t = exp(g_t) S_(t-1) + sum_m phi(k_m) v_m^T,   z_t = exp(g_t) z_(t-1) + sum_m phi(k_m)
    o_n = phi(q_n) S_t / (phi(q_n) . z_t + eps),     without `normalize` o_n = phi(q_n) S_t

    over the tokens m of step t, to which n belongs; a step is one token, or a frame of `block` tokens that see one
    another and the past. A token's own key is not decayed when it reads the state. Without decay this is linear
    attention as a recurrence (Katharopoulos et al. 2020, section 3.4); with one number a head the retention of RetNet
    (Sun et al. 2023, section 2.1, up to its scale, rotation and norm); with one a token and head, or a token and
    channel, gated linear attention (Yang et al. 2024, GLA, section 4), whose state RWKV-6 (Peng et al. 2024) shares.

    Args:
        q: (B, N, H, D), float16, bfloat16, float32 or float64, any strides.
        k: (B, N, Hkv, D), dtype of q; H is a multiple of Hkv.
        v: (B, N, Hkv, E), dtype of q.
        feature_map: phi: `"relu"`, `"elu1"` (elu(x) + 1), or None, q and k are mapped already.
        normalize: divide by the normalizer.
        decay: g, the logarithm of what is kept from step to step, at most 0, -inf forgets all: (Hkv,), (B, T, Hkv) or
            (B, T, Hkv, D) for T = N / `block` steps, the last on S's rows; float32 or the dtype of q. That it is at
            most 0 is checked by reading it, on a GPU too: a call there waits for the GPU. Under compilation, export
            and CUDA graph capture there is nothing to read, and it is not checked.
        state: S and z before the first token. A `LinearState` is updated in place, without gradients; a tensor
            (B, Hkv, D E + D), or (B, Hkv, D E) without `normalize`, float32, is left alone and is differentiable;
            None is zeros.
        return_state: return (o, state after the last token), of the kind that `state` is; for None, a tensor.
        form: `"chunkwise"`, tokens in tiles; `"recurrent"`, one after the other, for few; `"parallel"`, the N x N
            weights in plain torch; `"auto"`, one of the first two. They compute the same. The backward of Triton's
            recurrent form is chunkwise.
        block: tokens a frame; N is a multiple of it.
        eps: added to the denominator.
    Returns: (B, N, H, E) in the dtype of q, contiguous where Triton runs; or that and the state. S, z and the division
        are float32 (float64 for float64, whose states are float64 tensors).
    Raises: TypeError or ValueError, naming the argument, what came and what would fit; a state is then untouched.
    """
    check_inputs(q, k, v, decay, state, feature_map=feature_map, normalize=normalize, form=form, block=block, eps=eps)
    return run_causal_linear_attention(
        q, k, v, decay, state, feature_map=feature_map, normalize=normalize, return_state=return_state, form=form,
        block=block, eps=eps,
    )  # fmt: skip


def check_inputs(q, k, v, decay, state, *, feature_map, normalize, form, block, eps, look=True):
    """The checks of `causal_linear_attention`. look: at the numbers in `decay`, for which a CPU waits for the GPU."""
    check_qkv(q, k, v)
    _check_options(q, k, feature_map, form, block, eps)
    if decay is not None:
        _check_decay(q, k, decay, block, look)
    if state is not None:
        _check_state(q, k, v, state, normalize)


def run_causal_linear_attention(
    q, k, v, decay, state, *, feature_map=None, normalize=True, return_state=False, form="auto", block=1, eps=1e-15
):
    """`causal_linear_attention` without its checks."""
    tensor = state.tensor if isinstance(state, LinearState) else state
    inputs = (q, k, v, decay, tensor if tensor is state else None)
    grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    D, E = q.shape[3], v.shape[3]
    if form != "parallel" and kernels_fit(q, v, decay, block) and use_triton(q):
        options = (feature_map, normalize, float(eps), block)
        recurrent = form == "recurrent" or (form == "auto" and q.shape[1] <= RECURRENT_TOKENS)
        operators = torch.ops.diffattn
        if grad:
            out, after, _, _ = operators.causal_linear_attention(
                q, k, v, decay, tensor.clone() if tensor is not state else tensor, *options
            )
            if tensor is not state:
                tensor.copy_(after.detach())
                after = state
        elif tensor is None and not return_state:
            return operators.causal_linear_attention_inference(q, k, v, decay, *options, recurrent)
        else:
            if tensor is state:
                size = D * E + (D if normalize else 0)
                fresh = q.new_zeros(q.shape[0], k.shape[2], size, dtype=torch.float32)
                tensor = fresh if tensor is None else tensor.clone()
            out = operators.causal_linear_attention_step(q, k, v, decay, tensor, *options, recurrent)
            after = state if isinstance(state, LinearState) else tensor
        return (out, after) if return_state else out
    if form == "auto":
        # an export knows no number of tokens to loop over
        form = "parallel" if exporting() else "chunkwise"
    before = tensor.detach().clone() if tensor is not state and grad else tensor
    out, after = causal_linear_attention_reference(
        q, k, v, feature_map=feature_map, normalize=normalize, decay=decay, state=before, block=block, eps=eps,
        form=form,
    )  # fmt: skip
    if tensor is not state:
        tensor.copy_(after.detach())
        after = state
    return (out, after) if return_state else out


def kernels_fit(q, v, decay, block):
    """Whether shared memory holds what the kernels keep there of wide heads. The rest takes plain torch."""
    width = max(q.shape[3], v.shape[3])
    if width <= 128 or q.dtype == torch.bfloat16:
        return width <= MAX_HEAD_DIM
    # In other dtypes parts of a state take four bytes an element: 128 to 160 KiB with frames and with channels that
    # decay, 272 KiB where the gradient of a decay keeps a frame's own part beside what came before.
    if small_shared_memory(q.device) and (block > 1 or (decay is not None and decay.dim() == 4)):
        return False
    learns = torch.is_grad_enabled() and decay is not None and decay.requires_grad
    return width <= MAX_HEAD_DIM and not (block > 1 and learns)


def _check_options(q, k, feature_map, form, block, eps):
    if feature_map not in FEATURE_MAPS:
        raise ValueError(f"feature_map: got {feature_map!r}, expected one of {FEATURE_MAPS}")
    if form not in FORMS:
        raise ValueError(f"form: got {form!r}, expected one of {FORMS}")
    if isinstance(eps, bool) or not isinstance(eps, numbers.Real):
        raise TypeError(f"eps: got {type(eps).__name__}, expected a number")
    if not eps >= 0:
        raise ValueError(f"eps: got {eps}, expected 0 or more")
    if k.shape[1] != q.shape[1]:
        raise ValueError(f"k: got {k.shape[1]} tokens, expected {q.shape[1]} as q: each token brings its own key")
    if isinstance(block, bool) or not isinstance(block, (int, torch.SymInt)) or block < 1:
        raise ValueError(f"block: got {block!r}, expected a positive integer, the tokens of a frame")
    if q.shape[1] % block != 0:
        raise ValueError(f"block: got {block} tokens a frame, expected a divisor of the {q.shape[1]} tokens of q")


def _check_decay(q, k, decay, block, look=True):
    B, N = q.shape[:2]
    kv_heads, D = k.shape[2:]
    if not isinstance(decay, Tensor):
        raise TypeError(f"decay: got {type(decay).__name__}, expected a tensor")
    if not decay.dtype.is_floating_point:
        raise TypeError(f"decay: got {decay.dtype}, expected float32 or {q.dtype} as q")
    if decay.device != q.device:
        raise ValueError(f"decay: on {decay.device}, expected {q.device} as q")
    shapes = ((kv_heads,), (B, N // block, kv_heads), (B, N // block, kv_heads, D))
    if tuple(decay.shape) not in shapes:
        raise ValueError(
            f"decay: got shape {shape_of(decay)}, expected one of {shapes}: a number a head, a step and head, or a "
            "step, head and feature"
        )
    watched = look and not (torch.compiler.is_compiling() or exporting())
    if watched and not (decay.is_cuda and torch.cuda.is_current_stream_capturing()) and bool((decay > 0).any()):
        raise ValueError(
            f"decay: got {float(decay.max())}, expected 0 or less: it is the logarithm of what is kept, and the state "
            "would grow without bound"
        )


def _check_state(q, k, v, state, normalize):
    if isinstance(state, LinearState):
        if q.dtype == torch.float64:
            raise TypeError("state: a LinearState is float32 and q is float64: give a float64 tensor instead")
        if state.normalize != normalize:
            raise ValueError(f"state: made with normalize={state.normalize}, and the call has normalize={normalize}")
        if (state.head_dim, state.value_dim) != (k.shape[3], v.shape[3]):
            raise ValueError(
                f"state: made for D = {state.head_dim}, E = {state.value_dim}, expected D = {k.shape[3]}, "
                f"E = {v.shape[3]}"
            )
        state = state.tensor
    if not isinstance(state, Tensor):
        raise TypeError(f"state: got {type(state).__name__}, expected a LinearState, a tensor or None")
    check_state(state, k, v, normalize, torch.float64 if q.dtype == torch.float64 else torch.float32)
