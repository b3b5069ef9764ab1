"""Device functions shared by the forward and backward kernels.

Arithmetic. A product of two 16-bit tiles is exact up to float32 accumulation, but phi(q), the rotated tiles and
the state S are float32, and rounding two of them to bfloat16 already costs more than rounding the output. So:

- Products over the tokens (S = sum_m k_m v_m^T) keep the wide exponent range that sums and quotients need.
  `SUM` says how: `"split"` writes the float32 operand as high + low parts in the dtype of the other, `"tf32x2"`
  as high + low tf32 (11 bits each, as float16, with the exponents of float32), `"tf32x3"` splits both operands.
- Products with the state (o = q S) take S in `PARTS` float16 parts, which have three more bits than bfloat16.
  Powers of two, one a row, put both operands in float16's range. `PARTS` 0 stays in float32.

Tiles are padded in registers to powers of two; padding reads as phi = 0 and nothing of it is stored.
"""

import triton
import triton.language as tl


@triton.jit
def row_start(p, i_b, i_h, start, stride_b, stride_h, stride_n, ALIGN: tl.constexpr):
    """Pointer to token `start` of head (i_b, i_h). Every stride used here is a multiple of ALIGN elements."""
    head = i_b.to(tl.int64) * stride_b + i_h.to(tl.int64) * stride_h
    token = tl.cast(start, tl.int64) * stride_n
    return p + tl.multiple_of(head, ALIGN) + tl.multiple_of(token, ALIGN)


@triton.jit
def load_tile(
    p, o_n, o_d, stride_n, stride_d, n, D: tl.constexpr, BD: tl.constexpr, PAD: tl.constexpr, ALIGN: tl.constexpr
):
    """Rows o_n < n and columns o_d < D of the matrix at p; PAD elsewhere. o_d holds BD columns.

    A stride is 1 or a multiple of ALIGN: the compiler by itself only sees multiples of 16, and without knowing a
    common factor it loads one element at a time.
    """
    rows = tl.multiple_of(o_n.to(tl.int64) * stride_n, ALIGN)
    columns = tl.multiple_of(o_d.to(tl.int64) * stride_d, ALIGN)
    mask = o_n[:, None] < n
    if D % BD != 0:
        mask = mask & (o_d[None, :] < D)
    return tl.load(p + (rows[:, None] + columns[None, :]), mask=mask, other=PAD)


@triton.jit
def store_tile(p, x, o_n, o_d, stride_n, n, D: tl.constexpr, BD: tl.constexpr):
    """The inverse of `load_tile` for a matrix whose columns are contiguous."""
    offsets = o_n.to(tl.int64)[:, None] * stride_n + o_d[None, :]
    mask = o_n[:, None] < n
    if D % BD != 0:
        mask = mask & (o_d[None, :] < D)
    tl.store(p + offsets, x.to(p.dtype.element_ty), mask=mask)


@triton.jit
def load_state(p, o_d, o_e, D: tl.constexpr, E: tl.constexpr):
    """Columns o_e of the D x E matrix at p."""
    mask = (o_d[:, None] < D) & (o_e[None, :] < E)
    return tl.load(p + o_d[:, None] * E + o_e[None, :], mask=mask, other=0.0)


@triton.jit
def map_elements(x, MAP: tl.constexpr):
    """phi for the maps that act on each element alone; -inf gives 0."""
    x = x.to(tl.float32)
    if MAP == "relu":
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if MAP == "elu1":
        x = tl.where(x > 0, x + 1, tl.exp(tl.minimum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)))
    if MAP is None:
        # As loaded it would go straight into a product, and the pipeline keeps too few buffers of a tile that does
        # that and has another use: a race (triton-lang/triton#6691). The compiler does not fold an added 0.
        x += 0.0
    return x


@triton.jit
def map_query(x, MAP: tl.constexpr):
    """phi(q), [BN, BD] float32."""
    x = map_elements(x, MAP)
    if MAP == "softmax":
        top = tl.max(x, 1)
        top = tl.where(top == float("-inf"), 0.0, top)
        x = tl.exp(x - top[:, None])
        total = tl.sum(x, 1)
        x = x / tl.where(total == 0, 1.0, total)[:, None]
    return x


@triton.jit
def map_gradient(x, mapped, grad, MAP: tl.constexpr):
    """The gradient of x from that of mapped = phi(x), for the maps of `map_elements`."""
    if MAP == "relu":
        # not a product: the gradient of a dead feature may be as large as 1 / eps
        grad = tl.where(x.to(tl.float32) > 0, grad, 0.0)
    if MAP == "elu1":
        grad = grad * tl.minimum(mapped, 1.0)
    return grad


@triton.jit
def load_rotary(
    p, o_n, start, i_b, stride_b, stride_n, stride_d, n, D: tl.constexpr, BD: tl.constexpr, ALIGN: tl.constexpr
):
    """cos or sin of the tile's tokens, [BN, BD / 2] float32."""
    p = row_start(p, i_b, i_b, start, stride_b, 0, stride_n, ALIGN)
    return load_tile(p, o_n, tl.arange(0, BD // 2), stride_n, stride_d, n, D // 2, BD // 2, 0.0, ALIGN).to(tl.float32)


@triton.jit
def rotate(x, cos, sin):
    """(x_2i, x_2i+1) -> (x_2i cos - x_2i+1 sin, x_2i sin + x_2i+1 cos); with -sin, the inverse and the gradient."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), x.shape)


@triton.jit
def power_of_two(x):
    """s and 1 / s, powers of two with s * x in [1, 2), for x >= 0; where that is out of range, the nearest."""
    exponent = x.to(tl.int32, bitcast=True) >> 23
    exponent = tl.minimum(tl.maximum(exponent, 1), 253)
    scale = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    return scale, (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def round_to_tf32(x):
    """Round to the 11 bits that a tf32 product reads; by itself it truncates, which is biased."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def dot_tokens(a, b, acc, EXACT: tl.constexpr, SUM: tl.constexpr):
    """acc + a^T b for a [BN, BD] float32 and b [BN, BE] as loaded. EXACT: a is exact in the dtype of b."""
    if SUM == "tf32x3":
        acc = tl.dot(tl.trans(a), b.to(tl.float32), acc, input_precision="tf32x3")
    elif EXACT:
        acc = tl.dot(tl.trans(a.to(b.dtype)), b, acc)
    elif SUM == "tf32x2":
        b = b.to(tl.float32)
        high = round_to_tf32(a)
        acc = tl.dot(tl.trans(high), b, acc, input_precision="tf32")
        acc = tl.dot(tl.trans(round_to_tf32(a - high)), b, acc, input_precision="tf32")
    else:
        high = a.to(b.dtype)
        low = (a - high.to(tl.float32)).to(b.dtype)
        acc = tl.dot(tl.trans(high), b, acc)
        acc = tl.dot(tl.trans(low), b, acc)
    return acc


@triton.jit
def split_state(state, PARTS: tl.constexpr):
    """(high, low, scale) with state = (high + low) * scale[:, None]; without PARTS, (state, state, 1)."""
    if PARTS == 0:
        high = state
        low = state
        undo = tl.full((state.shape[0],), 1.0, tl.float32)
    else:
        scale, undo = power_of_two(tl.max(tl.abs(state), 1))
        scaled = state * scale[:, None]
        high = scaled.to(tl.float16)
        low = (scaled - high.to(tl.float32)).to(tl.float16)
    return high, low, undo


@triton.jit
def dot_state(x, high, low, EXACT: tl.constexpr, PARTS: tl.constexpr):
    """(y, scale) with y * scale[:, None] = x (high + low), for x [BN, K] float32 and parts of [K, L].

    EXACT: x has at most the 11 bits of float16.
    """
    if PARTS == 0:
        y = tl.dot(x, high, input_precision="tf32x3")
        undo = tl.full((x.shape[0],), 1.0, tl.float32)
    else:
        scale, undo = power_of_two(tl.max(tl.abs(x), 1))
        x = x * scale[:, None]
        x_high = x.to(tl.float16)
        y = tl.dot(x_high, high)
        if PARTS == 2:
            y = tl.dot(x_high, low, y)
            if not EXACT:
                y = tl.dot((x - x_high.to(tl.float32)).to(tl.float16), high, y)
    return y, undo
