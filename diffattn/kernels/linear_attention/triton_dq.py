"""The backward of queries, and the equations of the whole backward.

With d_n the denominator, g_n the gradient of o_n and t_n = S g_n:

dS = sum_n (q_n / d_n) g_n^T          q, k: mapped and rotated; u, w: mapped, not rotated
dz = sum_n dd_n u_n                   dd_n = -(q_n . t_n) / d_n^2  (o is not needed: g_n . o_n = q_n . t_n / d_n)
du_n = unrotate(t_n) / d_n + dd_n z
dw_m = unrotate(dS v_m) + dz,  dv_m = dS^T k_m

For "softmax" d_n = 1 and dz is replaced by the correction c of the softmax over tokens:
dk_m = w_m (unrotate(dS v_m) - c), c = sum_m w_m unrotate(dS v_m), which without rotation is the row sum of S dS.

Bytes: the queries' kernel reads q and g and writes dq, the keys' reads k and v and writes dk and dv: 7 B H N D
elements for D = E. Beyond 64 features there are no registers for dq and dS at once: programs side by side make them,
and all but one find q and g in the cache. Beyond 128, dk and dv come from kernels apart, and k is read twice.

Layouts. g goes from memory to both of its products, g S^T and g^T (q / d), without passing through registers. q is
mapped in the registers that g S^T comes in (`zero_of_products`), so that what the two give needs no exchange between
threads but the sums over features, which stay within four of them.
"""

import triton
import triton.language as tl

from diffattn.kernels.linear_attention.triton_tiles import (
    COUNTS,
    dot_parts,
    feature_offsets,
    load_rotary,
    load_tile,
    load_tokens,
    map_gradient,
    map_query,
    nothing,
    program_part,
    rotate,
    split,
    state_offsets,
    store_tile,
    tile_start,
    token_offsets,
    zero_of_products,
)


@triton.jit
def dot_gradient(grad, x, acc, PARTS: tl.constexpr):
    """acc + grad^T x for grad [BN, BE] in the dtype of the data and x [BN, BD] float32."""
    grad = tl.trans(grad)
    if PARTS == "tf32x3":
        acc = tl.dot(grad.to(tl.float32), x, acc, input_precision="tf32x3")
    else:
        if PARTS == "tf32":
            grad = grad.to(tl.float32)
        high, low = split(x, PARTS)
        acc = tl.dot(grad, high, acc, input_precision="tf32")
        acc = tl.dot(grad, low, acc, input_precision="tf32")
    return acc


@triton.jit
def sum_heads(x, PACK: tl.constexpr):
    """[BN, BD] to [BN, PACK]: sums over the features of each head."""
    return tl.sum(tl.reshape(x, (x.shape[0], PACK, x.shape[1] // PACK)), 2)


@triton.jit
def spread_heads(x, BD: tl.constexpr):
    """[BN, PACK] to [BN, BD]: a head's number at each of its features."""
    x = tl.broadcast_to(x[:, :, None], (x.shape[0], x.shape[1], BD // x.shape[1]))
    return tl.reshape(x, (x.shape[0], BD))


@triton.jit
def walk_queries(
    p_grad,
    p_q,
    p_cos,
    p_sin,
    p_state,
    p_dq,
    p_parts,
    i_b,
    i_h,
    o_e,
    first,
    last,
    stride_gb,
    stride_gn,
    stride_gh,
    stride_ge,
    stride_qb,
    stride_qn,
    stride_qh,
    stride_qd,
    stride_cb,
    stride_cn,
    stride_cd,
    N,
    n_heads,
    n_chunks,
    eps,
    D: tl.constexpr,
    E: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    BN: tl.constexpr,
    PACK: tl.constexpr,
    MAP: tl.constexpr,
    ROTARY: tl.constexpr,
    ALIGN: tl.constexpr,
    PARTS: tl.constexpr,
    PART_SIZE: tl.constexpr,
    TURNED: tl.constexpr,
    EDGE: tl.constexpr,
    APART: tl.constexpr,
    STAGES: tl.constexpr,
    DQ: tl.constexpr,
    DSTATE: tl.constexpr,
):
    """DQ: dq and the part of dz; DSTATE: columns o_e of the part of dS, of blocks `first` to `last` of the queries of
    PACK heads. With both, o_e is all of E."""
    SIZE: tl.constexpr = D * E + D
    PAD_D: tl.constexpr = D * PACK != BD
    PAD_E: tl.constexpr = E * PACK % BE != 0
    o_n = tl.arange(0, BN)
    o_d = tl.arange(0, BD)
    m_d = (o_d < D * PACK)[None, :]
    m_e = (o_e < E * PACK)[None, :]
    r_q = token_offsets(o_n, stride_qn, ALIGN)[:, None]
    r_q = r_q + feature_offsets(o_d, stride_qh, stride_qd, D, PACK, ALIGN)[None, :]
    r_gn = token_offsets(o_n, stride_gn, ALIGN)[:, None]
    r_dq = o_n.to(tl.int64)[:, None] * (n_heads * D) + o_d[None, :]
    if MAP != "softmax":
        normalizer = tl.load(p_state + D * E + o_d // D * SIZE + o_d % D, mask=o_d < D * PACK, other=0.0)
    zero = 0.0
    if DQ:
        zero = zero_of_products(BN, BD, p_q.dtype.element_ty)
        r_state, m_state = state_offsets(o_d, o_e, SIZE, D, E, PACK)
        high, low = split(tl.trans(tl.load(p_state + r_state, mask=m_state, other=0.0)), PARTS)
        # rows r and r + 8 of 16 are one thread's
        dnormalizer = tl.zeros((BN // 16, 8, BD), tl.float32)
    if DSTATE:
        dstate = tl.zeros((BE, BD), tl.float32)
    # tl.range also prefetches q, which goes into no product; range would not
    for i_block in tl.range(first, last, num_stages=STAGES):
        start = i_block * BN
        m_n = (o_n < N - start)[:, None]
        b_pq = tile_start(p_q, i_b, i_h, start, stride_qb, stride_qh, stride_qn, ALIGN)
        b_pg = tile_start(p_grad, i_b, i_h, start, stride_gb, stride_gh, stride_gn, ALIGN)
        b_q = load_tokens(b_pq, r_q, m_d, m_n, PAD_D, EDGE, TURNED)
        if MAP == "softmax":
            b_q = b_q.to(tl.float32) + zero
        mapped = map_query(b_q, m_d, MAP, PAD_D, zero)  # [BN, BD]
        if ROTARY:
            cos = load_rotary(p_cos, o_n, start, N - start, i_b, stride_cb, stride_cn, stride_cd, D, BD, ROTARY)
            sin = load_rotary(p_sin, o_n, start, N - start, i_b, stride_cb, stride_cn, stride_cd, D, BD, ROTARY)
        if MAP != "softmax":
            inverse = 1.0 / (sum_heads(mapped * normalizer[None, :], PACK) + eps)  # [BN, PACK]
            if EDGE:
                # rows past the end would be 0 / 0 with eps = 0
                inverse = tl.where(m_n, inverse, 0.0)
        if DSTATE or BE >= E:
            r_g = r_gn + feature_offsets(o_e, stride_gh, stride_ge, E, PACK, ALIGN)[None, :]
            b_g = load_tile(b_pg, r_g, m_e, m_n, PAD_E, EDGE, 0.0)
        if DQ:
            if BE >= E:
                t = dot_parts(b_g.to(tl.float32), high, low, N, True, PARTS, APART)  # [BN, BD]
            else:
                t = tl.zeros((BN, BD), tl.float32)
                for i_e in range(tl.cdiv(E, BE)):
                    o_i = i_e * BE + o_e
                    r_state, m_state = state_offsets(o_d, o_i, 0, D, E, 1)
                    b_s = tl.load(p_state + r_state, mask=m_state, other=0.0)
                    high, low = split(tl.trans(b_s), PARTS)
                    r_g = r_gn + feature_offsets(o_i, 0, stride_ge, E, 1, ALIGN)[None, :]
                    b_g = load_tile(b_pg, r_g, (o_i < E)[None, :], m_n, True, EDGE, 0.0)
                    t += dot_parts(b_g.to(tl.float32), high, low, N, True, PARTS, APART)
            if ROTARY:
                t = rotate(t, cos, -sin)
            # a rotation of both sides changes no product: q_n . t_n is u_n . unrotate(t_n)
            if MAP == "softmax":
                b_dq = mapped * (t - tl.sum(mapped * t, 1)[:, None])
            else:
                # not inverse^2, which may overflow
                ddenominator = spread_heads(-sum_heads(mapped * t, PACK) * inverse * inverse, BD)
                dnormalizer += tl.sum(tl.reshape(ddenominator * mapped, (BN // 16, 2, 8, BD)), 1)
                t = t * spread_heads(inverse, BD) + ddenominator * normalizer[None, :]
                b_dq = map_gradient(mapped, mapped, t, MAP)
            b_pdq = p_dq + ((i_b.to(tl.int64) * N + start) * n_heads + i_h) * D
            store_tile(b_pdq, b_dq, r_dq, m_d, m_n, PAD_D, EDGE)
        if DSTATE:
            scaled = mapped
            if MAP != "softmax":
                scaled = mapped * spread_heads(inverse, BD)
            if ROTARY:
                scaled = rotate(scaled, cos, sin)
            dstate = dot_gradient(b_g, scaled, dstate, PARTS) + nothing(N)
    # a head's parts lie side by side
    SPAN = n_chunks * PART_SIZE
    if DQ and MAP != "softmax":
        dnormalizer = tl.sum(tl.reshape(dnormalizer, (BN // 2, BD)), 0)
        tl.store(p_parts + D * E + o_d // D * SPAN + o_d % D, dnormalizer, mask=o_d < D * PACK)
    if DSTATE:
        r_state, m_state = state_offsets(o_d, o_e, SPAN, D, E, PACK)
        tl.store(p_parts + r_state, tl.trans(dstate), mask=m_state)


@triton.jit(do_not_specialize=[*COUNTS, "group"])
def linear_attention_dq_bwd_kernel(
    p_grad,
    p_q,
    p_cos,
    p_sin,
    p_state,
    p_dq,
    p_parts,
    stride_gb,
    stride_gn,
    stride_gh,
    stride_ge,
    stride_qb,
    stride_qn,
    stride_qh,
    stride_qd,
    stride_cb,
    stride_cn,
    stride_cd,
    N,
    n_heads,
    n_chunks,
    chunk,
    group,
    eps,
    D: tl.constexpr,
    E: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    BN: tl.constexpr,
    PACK: tl.constexpr,
    MAP: tl.constexpr,
    ROTARY: tl.constexpr,
    ALIGN: tl.constexpr,
    PARTS: tl.constexpr,
    SHARERS: tl.constexpr,
    PART_SIZE: tl.constexpr,
    TURNED: tl.constexpr,
    EDGE: tl.constexpr,
    APART: tl.constexpr,
    STAGES: tl.constexpr,
):
    """What `chunk` blocks of queries of PACK heads give: their dq, and their parts of dz and dS, which go to
    (b, h, i_chunk).

    SHARERS: how many programs share that work: with more than one the first makes dq and dz, each other BE columns of
    dS. They run side by side, so that the cache serves all but one with q and g.
    TURNED: the tokens of q lie side by side in memory. EDGE: N is no multiple of BN.
    """
    i_b, i_h, i_chunk, first, last = program_part(n_heads, n_chunks, chunk, tl.cdiv(N, BN), PACK, SHARERS)
    p_parts += ((i_b * n_heads + i_h).to(tl.int64) * n_chunks + i_chunk) * PART_SIZE
    p_state += ((i_b * n_heads + i_h) // group).to(tl.int64) * (D * E + D)
    i_sharer = tl.program_id(0) % SHARERS
    o_e = tl.arange(0, BE)
    if i_sharer == 0:
        walk_queries(
            p_grad, p_q, p_cos, p_sin, p_state, p_dq, p_parts, i_b, i_h, o_e, first, last,
            stride_gb, stride_gn, stride_gh, stride_ge, stride_qb, stride_qn, stride_qh, stride_qd,
            stride_cb, stride_cn, stride_cd, N, n_heads, n_chunks, eps,
            D, E, BD, BE, BN, PACK, MAP, ROTARY, ALIGN, PARTS, PART_SIZE, TURNED, EDGE, APART, STAGES,
            True, SHARERS == 1,
        )  # fmt: skip
    else:
        walk_queries(
            p_grad, p_q, p_cos, p_sin, p_state, p_dq, p_parts, i_b, i_h,
            (i_sharer - 1) * BE + o_e, first, last,
            stride_gb, stride_gn, stride_gh, stride_ge, stride_qb, stride_qn, stride_qh, stride_qd,
            stride_cb, stride_cn, stride_cd, N, n_heads, n_chunks, eps,
            D, E, BD, BE, BN, PACK, MAP, ROTARY, ALIGN, PARTS, PART_SIZE, TURNED, EDGE, APART, STAGES,
            False, True,
        )  # fmt: skip
