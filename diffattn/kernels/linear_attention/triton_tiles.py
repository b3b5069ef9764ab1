"""Device functions shared by the forward and backward kernels.

Arithmetic. Sums and quotients of 16-bit data need more bits and a wider range than the data have, so a float32
operand of a product is written as a sum of `PARTS`:

- `"bf16"`, for bfloat16 data: high + low, 16 bits in all, with the exponents of float32.
- `"tf32"`, for float16 data: high + low in tf32, 22 bits.
- `"tf32x3"`, for float32 data: Triton splits both operands into tf32 parts.
- `"tf32x1"`: one tf32 part, 11 bits, for float16 data of wide heads, which have no registers for more.
- `"tf32cut"`: the same, but cut off by the product itself, for bfloat16 queries of wide heads: three products would
  take longer than the memory, and numerator and denominator see the same cut query, so most of it cancels.

EXACT says that an operand has the bits of the data, as relu(k) has: then it is one part.

Tiles are padded in registers to powers of two. Padding reads as 0 and nothing of it is stored. Heads of up to 32
features share a tile, PACK of them side by side, so that its rows are whole lines of memory. Their states are blocks
on a diagonal; products between different heads are 0 or not used.

Waits. Products run asynchronously, and Triton up to 3.7 lets one whose left operand is in registers run on into the
next turn of a loop, which may overwrite them (triton-lang/triton#9433). So the loops end each turn with a product
whose result is also used in plain arithmetic, which has to wait for it and for all before it: `+ nothing(n)`.
"""

import triton
import triton.language as tl

# Arguments that differ from call to call: a kernel made for each value would be compiled again and again.
COUNTS = ["n_heads", "n_chunks", "chunk"]


@triton.jit
def program_part(n_heads, n_chunks, chunk, n_blocks, PACK: tl.constexpr, SHARERS: tl.constexpr = 1):
    """(sample, first head, chunk, first block, last block) of this program, the same for SHARERS in a row. Heads vary
    fastest: programs that run together read the same rows of memory."""
    i_p = tl.program_id(0) // SHARERS
    n_groups = n_heads // PACK
    i_h = i_p % n_groups * PACK
    i_chunk = i_p // n_groups % n_chunks
    i_b = i_p // n_groups // n_chunks
    first = i_chunk * chunk
    return i_b, i_h, i_chunk, first, tl.minimum(first + chunk, n_blocks)


@triton.jit
def nothing(n):
    """0 for a number of tokens, which the compiler cannot know. It knows a 1, but then no loop has a second turn."""
    return (n + tl.zeros((), tl.int32) < 0).to(tl.float32)


@triton.jit
def token_offsets(o_n, stride_n, ALIGN: tl.constexpr):
    """A stride is 1 or a multiple of ALIGN elements: the compiler by itself only sees multiples of 16, and without
    knowing a common factor it loads one element at a time."""
    return tl.multiple_of(o_n.to(tl.int64) * stride_n, ALIGN)


@triton.jit
def feature_offsets(o_d, stride_h, stride_d, D: tl.constexpr, PACK: tl.constexpr, ALIGN: tl.constexpr):
    """Of the features of PACK heads, side by side."""
    if PACK == 1:
        offsets = tl.multiple_of(o_d.to(tl.int64) * stride_d, ALIGN)
    else:
        head = tl.multiple_of((o_d // D).to(tl.int64) * stride_h, ALIGN)
        offsets = head + tl.multiple_of((o_d % D).to(tl.int64) * stride_d, ALIGN)
    return offsets


@triton.jit
def tile_start(p, i_b, i_h, start, stride_b, stride_h, stride_n, ALIGN: tl.constexpr):
    """Pointer to token `start` of head (i_b, i_h)."""
    head = i_b.to(tl.int64) * stride_b + i_h.to(tl.int64) * stride_h
    token = tl.cast(start, tl.int64) * stride_n
    return p + tl.multiple_of(head, ALIGN) + tl.multiple_of(token, ALIGN)


@triton.jit
def load_tile(p, offsets, m_d, m_n, PADDED: tl.constexpr, EDGE: tl.constexpr, PAD: tl.constexpr):
    """The tile at p + offsets: 0 outside m_d, which only matters if PADDED, and PAD outside m_n, only if EDGE."""
    if EDGE:
        x = tl.load(p + offsets, mask=m_d & m_n, other=PAD)
    elif PADDED:
        x = tl.load(p + offsets, mask=tl.broadcast_to(m_d, offsets.shape), other=0.0)
    else:
        x = tl.load(p + offsets)
    return x


@triton.jit
def store_tile(p, x, offsets, m_d, m_n, PADDED: tl.constexpr, EDGE: tl.constexpr):
    """The inverse of `load_tile`."""
    x = x.to(p.dtype.element_ty)
    if EDGE:
        tl.store(p + offsets, x, mask=m_d & m_n)
    elif PADDED:
        tl.store(p + offsets, x, mask=tl.broadcast_to(m_d, offsets.shape))
    else:
        tl.store(p + offsets, x)


@triton.jit
def state_offsets(o_d, o_e, head_size, D: tl.constexpr, E: tl.constexpr, PACK: tl.constexpr):
    """Where element (o_d, o_e) of the state lies, the states of PACK heads being blocks on a diagonal, and whether it
    is one of theirs. A head's state takes `head_size` elements."""
    if PACK == 1:
        offsets = o_d[:, None] * E + o_e[None, :]
        m_state = (o_d[:, None] < D) & (o_e[None, :] < E)
    else:
        offsets = (o_d // D * head_size)[:, None] + (o_d % D)[:, None] * E + (o_e % E)[None, :]
        m_state = (o_d // D)[:, None] == (o_e // E)[None, :]
    return offsets, m_state


@triton.jit
def map_elements(x, MAP: tl.constexpr, zero=0.0):
    """phi for the maps that act on each element alone, float32; -inf gives 0. `zero` may be a tensor of zeros, whose
    layout the result then has."""
    x = x.to(tl.float32)
    if MAP == "relu":
        x = tl.maximum(x, zero, propagate_nan=tl.PropagateNan.ALL)
    if MAP == "elu1":
        # exp2 is one instruction; exp would take care of denormal results
        x = tl.maximum(x, zero, propagate_nan=tl.PropagateNan.ALL) + tl.exp2(tl.minimum(x, zero) * 1.4426950408889634)
    if MAP is None:
        # As loaded it would go straight into a product, and the pipeline keeps too few buffers of a tile that does
        # that and has another use: a race (triton-lang/triton#6691). The compiler does not fold an added 0.
        x += zero
    return x


@triton.jit
def map_query(x, m_d, MAP: tl.constexpr, PADDED: tl.constexpr, zero=0.0):
    """phi(q), [BN, BD] float32."""
    x = map_elements(x, MAP, zero)
    if MAP == "softmax":
        if PADDED:
            x = tl.where(m_d, x, float("-inf"))
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
    p, o_n, start, n, i_b, stride_b, stride_n, stride_d, D: tl.constexpr, BD: tl.constexpr, ALIGN: tl.constexpr
):
    """cos or sin of the tile's tokens, [BN, BD / 2] float32."""
    o_d = tl.arange(0, BD // 2)
    p = tile_start(p, i_b, i_b, start, stride_b, 0, stride_n, ALIGN)
    offsets = token_offsets(o_n, stride_n, ALIGN)[:, None] + feature_offsets(o_d, 0, stride_d, D, 1, ALIGN)[None, :]
    return load_tile(p, offsets, (o_d < D // 2)[None, :], (o_n < n)[:, None], True, True, 0.0).to(tl.float32)


@triton.jit
def rotate(x, cos, sin):
    """(x_2i, x_2i+1) -> (x_2i cos - x_2i+1 sin, x_2i sin + x_2i+1 cos); with -sin, the inverse and the gradient."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), x.shape)


@triton.jit
def split(x, PARTS: tl.constexpr):
    """(high, low) with x = high + low up to the bits of two parts."""
    if PARTS == "bf16":
        # the high part is cut, not rounded: no conversion back is needed to find the low one
        high = (x.to(tl.int32, bitcast=True) & -0x10000).to(tl.float32, bitcast=True)
        low = (x - high).to(tl.bfloat16)
        high = high.to(tl.bfloat16)
    elif PARTS == "tf32x3":
        high = x
        low = x
    else:
        # a product reads 11 bits and cuts the rest, which is biased
        high = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        low = x - high
    return high, low


@triton.jit
def dot_tokens(a, b, acc, EXACT: tl.constexpr, PARTS: tl.constexpr):
    """acc + a b for a [BD, BN] float32 and b [BN, BE] in the dtype of the data. EXACT: a has the bits of it."""
    if PARTS == "tf32x3":
        acc = tl.dot(a, b.to(tl.float32), acc, input_precision="tf32x3")
    elif PARTS == "tf32x1" or PARTS == "tf32cut":
        acc = tl.dot(split(a, PARTS)[0], b.to(tl.float32), acc, input_precision="tf32")
    elif EXACT:
        acc = tl.dot(a.to(b.dtype), b, acc)
    else:
        high, low = split(a, PARTS)
        if PARTS == "tf32":
            b = b.to(tl.float32)
        acc = tl.dot(high, b, acc, input_precision="tf32")
        acc = tl.dot(low, b, acc, input_precision="tf32")
    return acc


@triton.jit
def dot_state(x, high, low, EXACT: tl.constexpr, PARTS: tl.constexpr):
    """x (high + low) for x [BN, K] float32 and the parts of a [K, L] matrix. EXACT: x has the bits of the data."""
    if PARTS == "tf32x3":
        y = tl.dot(x, high, input_precision="tf32x3")
    elif PARTS == "tf32x1":
        x, _ = split(x, PARTS)
        y = tl.dot(x, high, input_precision="tf32")
    elif PARTS == "tf32cut":
        y = tl.dot(x, high, input_precision="tf32")
    elif EXACT:
        x = x.to(high.dtype)
        y = tl.dot(x, high, input_precision="tf32")
        y = tl.dot(x, low, y, input_precision="tf32")
    else:
        x_high, x_low = split(x, PARTS)
        y = tl.dot(x_high, high, input_precision="tf32")
        y = tl.dot(x_high, low, y, input_precision="tf32")
        y = tl.dot(x_low, high, y, input_precision="tf32")
    return y


@triton.jit
def load_tokens(p, offsets, m_d, m_n, PADDED: tl.constexpr, EDGE: tl.constexpr, TURNED: tl.constexpr):
    """The tile [BN, BD] at p + offsets, 0 outside the masks. TURNED: its tokens lie side by side in memory."""
    if TURNED:
        # the pipeline fetches ahead what is loaded as it lies, and not what goes into a product turned
        x = tl.trans(load_tile(p, tl.trans(offsets), tl.trans(m_d), tl.trans(m_n), PADDED, EDGE, 0.0))
    else:
        x = load_tile(p, offsets, m_d, m_n, PADDED, EDGE, 0.0)
    return x


@triton.jit
def dot_parts(x, high, low, n, EXACT: tl.constexpr, PARTS: tl.constexpr, APART: tl.constexpr):
    """`dot_state`; APART: with products that are summed outside of them. A sum that one hands to the next makes the
    compiler give whole rows to each warp, and with fewer than 16 rows a warp it computes all of them twice."""
    if not APART:
        y = dot_state(x, high, low, EXACT, PARTS)
    else:
        # a plain zero would be folded, and the sum handed on after all
        zero = tl.zeros((x.shape[0], high.shape[1]), tl.float32) + nothing(n)
        if EXACT:
            x = x.to(high.dtype)
            y = tl.dot(x, high, zero) + tl.dot(x, low, zero)
        else:
            x_high, x_low = split(x, PARTS)
            y = tl.dot(x_high, high, zero) + tl.dot(x_high, low, zero) + tl.dot(x_low, high, zero)
    return y


@triton.jit
def zero_of_products(BN: tl.constexpr, BD: tl.constexpr, dtype: tl.constexpr):
    """[BN, 1] float32 zeros that lie among the threads as the rows of a product [BN, BD] do. What is computed with
    them lies so, too: a tile in the layout it was loaded in would be mapped a second time where it meets a product."""
    return tl.sum(tl.dot(tl.zeros((BN, 16), dtype), tl.zeros((16, BD), dtype)), 1)[:, None]
