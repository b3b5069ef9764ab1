"""What the walking kernels share: reading tokens in either direction, decay, products, and what is done to an output.

Roles. One operation serves forward and backward (`triton.py` says which call gets what): for tokens in the order of
the walk, with "keys" of D features, "values" of E and a state S, D x E,

    o_n = q_n S_n,   S_n = exp(g_n) S_(n-1) + k_n v_n^T

- FLIP: the walk goes from the last token to the first.
- POST: the decay of a token acts after it is read, as in the gradient of a causal sum.
- DECAY: 0 none, 1 a number a step, 2 one for each key feature, 3 one for each value feature.
- NORM: o is divided by q_n . z_n + eps, z the state of the keys alone; z follows S in memory.
- WEIGH: 1, a product q_n . k_m counts a_n (q_n . k_m) + b_n; 2, it counts a_m (q_n . k_m) + b_m. The b, only with
  BIAS, need the state of the values alone, which then follows S in memory.
- STRICT: a token does not see its own step. ADD: the output so far, of a walk the other way, is added to; `a` holds
  one over its denominators, and the new one is the sum.
- RESIDUAL: 1, the inverse of the denominator is written as well; 2, what rounding took from o, too.
- X: the output is the gradient of phi(x), and is turned into that of x. RATE: phi(x) times what came from other steps
  is written too, the gradient of the decay is made of it.

Decay. Weights are exp of sums of g over tokens, differences of prefix sums here. Each g is cut into a multiple of
2^-10 and a rest below that: sums and differences of the first are exact, those of the second are off by 1e-8, and so
the exponents are, too, however strong the decay. None is above 0. Below e^-104 there is nothing in float32, where g
is cut off.
"""

import triton
import triton.language as tl

from diffattn.kernels.linear_attention.triton_tiles import (
    dot_state,
    dot_tokens,
    feature_offsets,
    map_elements,
    map_gradient,
    split,
    tile_start,
    token_offsets,
)

# Arguments that differ from call to call: a kernel made for each value would be compiled again and again.
COUNTS = ["N", "n_heads", "n_segments", "segment", "block", "group_q", "group_k", "group_g"]


@triton.jit
def walk_program(i_p, n_heads, n_segments):
    """(sample, head, segment) of a program. Heads vary fastest: they lie side by side in memory."""
    return i_p // n_heads // n_segments, i_p % n_heads, i_p // n_heads % n_segments


@triton.jit
def row_offsets(o_n, stride_n, FLIP: tl.constexpr, ALIGN: tl.constexpr):
    """Offsets of the tile's tokens from its first one."""
    if FLIP:
        offsets = token_offsets(-o_n, stride_n, ALIGN)
    else:
        offsets = token_offsets(o_n, stride_n, ALIGN)
    return offsets


@triton.jit
def tile_offsets(o_n, o_d, stride_n, stride_d, D: tl.constexpr, FLIP: tl.constexpr, ALIGN: tl.constexpr):
    return row_offsets(o_n, stride_n, FLIP, ALIGN)[:, None] + feature_offsets(o_d, 0, stride_d, D, 1, ALIGN)[None, :]


@triton.jit
def token_at(start, N, FLIP: tl.constexpr):
    """Where the token lies that comes `start` tokens after the first of the walk."""
    if FLIP:
        start = N - 1 - start
    return start


@triton.jit
def load_mapped(
    p, i_b, i_h, start, N, stride_b, stride_h, stride_n, offsets, mask,
    MAP: tl.constexpr, FLIP: tl.constexpr, ALIGN: tl.constexpr, RAW: tl.constexpr = False,
):  # fmt: skip
    """phi of a tile, float32, 0 outside of `mask`. RAW: without a map as it is, for products to read where it lies."""
    PAD: tl.constexpr = float("-inf") if MAP == "elu1" else 0.0
    p = tile_start(p, i_b, i_h, token_at(start, N, FLIP), stride_b, stride_h, stride_n, ALIGN)
    x = tl.load(p + offsets, mask=mask, other=PAD)
    if not (RAW and MAP is None):
        x = map_elements(x, MAP)
    return x


@triton.jit
def load_rows(p, i_b, i_h, start, N, n_heads, o_n, m_n, FLIP: tl.constexpr):
    """A number for each token of the tile, from a contiguous (B, N, H); 0 outside of m_n."""
    return tl.load(p + row_index(i_b, i_h, start, N, n_heads, o_n, FLIP), mask=m_n, other=0.0)


@triton.jit
def row_index(i_b, i_h, start, N, n_heads, o_n, FLIP: tl.constexpr):
    """Rows of a contiguous (B, N, H, ...), int64."""
    token = token_at(start, N, FLIP) + row_offsets(o_n, 1, FLIP, 1)
    return (i_b.to(tl.int64) * N + token) * n_heads + i_h


@triton.jit
def limit_decay(g):
    return tl.maximum(g.to(tl.float32), -104.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def sum_decay(g, POST: tl.constexpr):
    """(high, low, total high, total low): sums of g up to each token of a tile, or with POST up to the one before."""
    high = tl.floor(g * 1024.0) * 0.0009765625
    low = g - high
    sum_high, sum_low = tl.cumsum(high, 0), tl.cumsum(low, 0)
    total_high, total_low = tl.sum(high, 0), tl.sum(low, 0)
    if POST:
        sum_high -= high
        sum_low -= low
    return sum_high, sum_low, total_high, total_low


@triton.jit
def load_sums(p, stride_part, ROUND: tl.constexpr):
    """(high parts, low parts) of sums of g; the low ones are 0, and not there, with ROUND."""
    high, low = tl.load(p), 0.0
    if not ROUND:
        low = tl.load(p + stride_part)
    return high, low


@triton.jit
def weight(g, BASE_2: tl.constexpr):
    """What a sum of decays leaves of a token: exp(g), or 2^g of sums in such units."""
    if BASE_2:
        g = tl.exp2(g)
    else:
        g = tl.exp(g)
    return g


@triton.jit
def product(a, b, EXACT_A: tl.constexpr, EXACT_B: tl.constexpr, PARTS: tl.constexpr, dtype: tl.constexpr, acc=None):
    """acc + a b of float32 operands. EXACT: it has the bits of the data, or may be rounded to them."""
    if acc is None:
        acc = tl.zeros((a.shape[0], b.shape[1]), tl.float32)
    if EXACT_B:
        acc = dot_tokens(a, b.to(dtype), acc, EXACT_A, PARTS)
    else:
        high, low = split(b, PARTS)
        acc += dot_state(a, high, low, EXACT_A, PARTS)
    return acc


@triton.jit
def load_state(p_in, i_state, o_d, o_e, D: tl.constexpr, E: tl.constexpr, INIT: tl.constexpr, TAIL: tl.constexpr):
    """(S [BD, BE], what follows it): TAIL 1 is z of the keys, 2 that of the values. Zeros unless INIT."""
    state = tl.zeros((o_d.shape[0], o_e.shape[0]), tl.float32)
    tail = tl.zeros((o_e.shape[0] if TAIL == 2 else o_d.shape[0],), tl.float32)
    SIZE: tl.constexpr = D * E + (D if TAIL == 1 else 0) + (E if TAIL == 2 else 0)
    if INIT:
        p_in += i_state.to(tl.int64) * SIZE
        r_state = o_d[:, None] * E + o_e[None, :]
        state = tl.load(p_in + r_state, mask=(o_d < D)[:, None] & (o_e < E)[None, :], other=0.0)
        if TAIL == 1:
            tail = tl.load(p_in + D * E + o_d, mask=o_d < D, other=0.0)
        if TAIL == 2:
            tail = tl.load(p_in + D * E + o_e, mask=o_e < E, other=0.0)
    return state, tail


@triton.jit
def store_state(p_out, i_state, state, tail, o_d, o_e, D: tl.constexpr, E: tl.constexpr, TAIL: tl.constexpr):
    SIZE: tl.constexpr = D * E + (D if TAIL == 1 else 0) + (E if TAIL == 2 else 0)
    p_out += i_state.to(tl.int64) * SIZE
    tl.store(p_out + o_d[:, None] * E + o_e[None, :], state, mask=(o_d < D)[:, None] & (o_e < E)[None, :])
    if TAIL == 1:
        if tl.program_id(1) == 0:
            tl.store(p_out + D * E + o_d, tail, mask=o_d < D)
    if TAIL == 2:
        tl.store(p_out + D * E + o_e, tail, mask=o_e < E)


@triton.jit
def load_output(p_o, p_residual, rows, o_e, m, E: tl.constexpr, RESIDUAL: tl.constexpr):
    """What a walk before this one wrote, float32."""
    r_o = rows[:, None] * E + o_e[None, :]
    o = tl.load(p_o + r_o, mask=m, other=0.0).to(tl.float32)
    if RESIDUAL == 2:
        o += tl.load(p_residual + r_o, mask=m, other=0.0).to(tl.float32)
    return o


@triton.jit
def write_output(
    p_o, p_residual, p_x, p_rate, others, own, rows, i_b, i_h, start, N, n_rows, o_e, m,
    stride_xb, stride_xh, stride_xn, r_x, E: tl.constexpr, X: tl.constexpr, MAP_X: tl.constexpr,
    RATE: tl.constexpr, RESIDUAL: tl.constexpr, FLIP: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Write others + own, what came from other steps and from the token's own.

    RATE: 1 writes the sum over these features of phi(x) times `others`, to (e block, row), 2 each product.
    """
    r_o = rows[:, None] * E + o_e[None, :]
    o = others
    if own is not None:
        o += own
    if X:
        b_x = tile_start(p_x, i_b, i_h, token_at(start, N, FLIP), stride_xb, stride_xh, stride_xn, ALIGN)
        b_x = tl.load(b_x + r_x, mask=m, other=0.0)
        mapped = map_elements(b_x, MAP_X)
        if RATE == 1:
            rate = tl.sum(tl.where(m, mapped * others, 0.0), 1)
            tl.store(p_rate + tl.program_id(1) * n_rows + rows, rate, mask=tl.max(m.to(tl.int32), 1) > 0)
        if RATE == 2:
            tl.store(p_rate + r_o, mapped * others, mask=m)
        o = map_gradient(b_x, mapped, o, MAP_X)
    rounded = o.to(p_o.dtype.element_ty)
    tl.store(p_o + r_o, rounded, mask=m)
    if RESIDUAL == 2:
        tl.store(p_residual + r_o, (o - rounded.to(tl.float32)).to(p_residual.dtype.element_ty), mask=m)
