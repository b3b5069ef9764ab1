"""Forward kernel for Hopper in Gluon, with the schedule of FlashAttention-3 (Shah et al. 2024).

One warp does nothing but load, two or three warpgroups compute 64 rows each. In a warpgroup the scores of a block of
keys are multiplied while the values of the block before are weighted and its softmax runs; the other warpgroups fill
the gaps. A head dim that is no power of two is two pieces, 96 = 64 + 32. Programs stay, and take tile after tile.

For inference without a mask or with one over keys; every product is asynchronous, which the interpreter cannot run.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def _larger(a, b):
    # A NaN score has to make its row NaN.
    return gl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


# A thread holds columns 8 j + c of two rows for every j and two c: over j nothing moves, and there are four chains of
# instructions that wait for each other instead of two.
@gluon.jit
def _row_max(b_x, layout: gl.constexpr):
    b_x = gl.reduce(b_x.reshape([b_x.shape[0], b_x.shape[1] // 8, 8]), 1, _larger)
    return gl.convert_layout(gl.reduce(b_x, 1, _larger), layout, assert_trivial=True)


@gluon.jit
def _partial_sums(b_x):
    """[R, C] to [R, 8], each a sum within a thread."""
    return gl.sum(b_x.reshape([b_x.shape[0], b_x.shape[1] // 8, 8]), 1)


@gluon.jit
def _scaled(b_x, b_factor):
    """Rows of b_x times b_factor, which lies in one of several equal layouts."""
    layout: gl.constexpr = gl.SliceLayout(1, b_x.type.layout)
    return b_x * gl.convert_layout(b_factor, layout, assert_trivial=True)[:, None]


@gluon.jit
def _tile(i_tile, N, H, G, ROWS: gl.constexpr):
    """Batch, head, key/value head and first row of a tile."""
    n_tiles = (N + ROWS - 1) // ROWS
    i_n = i_tile % n_tiles
    i_bh = i_tile // n_tiles
    i_h = i_bh % H
    return i_bh // H, i_h, i_h // G, i_n * ROWS


@gluon.jit
def _load(p_a, p_b, b_a, b_b, i_b, i_n, i_h, full, D0: gl.constexpr, D1: gl.constexpr, BYTES: gl.constexpr):
    mbarrier.expect(full, BYTES)
    tma.async_copy_global_to_shared(p_a, [i_b, i_n, i_h, 0], full, b_a)
    if D1 > 0:
        tma.async_copy_global_to_shared(p_b, [i_b, i_n, i_h, D0], full, b_b)


@gluon.jit
def _producer(
    p_q0, p_q1, p_k0, p_k1, p_v0, p_v1, p_ks,
    s_q0, s_q1, s_k0, s_k1, s_v0, s_v1, s_ks,
    q_full, q_empty, k_full, v_full, kv_empty,
    N, M, H, G, n_tiles,
    D0: gl.constexpr, D1: gl.constexpr, BM: gl.constexpr, NC: gl.constexpr, STAGES: gl.constexpr,
    KEYS: gl.constexpr, QK_SIZE: gl.constexpr, PV_SIZE: gl.constexpr,
):  # fmt: skip
    Q_BYTES: gl.constexpr = 64 * (D0 + D1) * QK_SIZE
    K_BYTES: gl.constexpr = BM * (D0 + D1) * QK_SIZE + (BM * 4 if KEYS != 0 else 0)
    V_BYTES: gl.constexpr = BM * (D0 + D1) * PV_SIZE
    n_blocks = (M + BM - 1) // BM
    i_kv = 0
    i_q = 0
    for i_tile in range(gl.program_id(0), n_tiles, gl.num_programs(0)):
        i_b, i_h, i_g, i_n = _tile(i_tile, N, H, G, 64 * NC)
        # Keys run one block ahead of values, as they are used.
        for j in range(0, n_blocks + 1):
            # For the keys of this block and the values of the block before.
            slot = i_kv % STAGES
            mbarrier.wait(kv_empty.index(slot), (i_kv // STAGES & 1) ^ 1)
            if j < n_blocks:
                _load(p_k0, p_k1, s_k0.index(slot), s_k1.index(slot), i_b, (n_blocks - 1 - j) * BM, i_g,
                      k_full.index(slot), D0, D1, K_BYTES)  # fmt: skip
                if KEYS != 0:
                    i_s = i_b * (H // G) + i_g if KEYS == 2 else i_b
                    tma.async_copy_global_to_shared(
                        p_ks, [i_s, (n_blocks - 1 - j) * BM], k_full.index(slot), s_ks.index(slot)
                    )
            if j == 0:
                for c in gl.static_range(NC):
                    mbarrier.wait(q_empty.index(c), (i_q & 1) ^ 1)
                    _load(p_q0, p_q1, s_q0.index(c), s_q1.index(c), i_b, i_n + 64 * c, i_h, q_full.index(c),
                          D0, D1, Q_BYTES)  # fmt: skip
                i_q += 1
            if j > 0:
                last = i_kv - 1
                slot = last % STAGES
                _load(p_v0, p_v1, s_v0.index(slot), s_v1.index(slot), i_b, (n_blocks - j) * BM, i_g,
                      v_full.index(slot), D0, D1, V_BYTES)  # fmt: skip
            if j < n_blocks:
                i_kv += 1


@gluon.jit
def _scores(
    s_q0, s_q1, s_k0, s_k1, slot,
    D0: gl.constexpr, D1: gl.constexpr, BM: gl.constexpr, INT8: gl.constexpr, L_X: gl.constexpr,
):  # fmt: skip
    b_start = gl.zeros([64, BM], gl.int32 if INT8 else gl.float32, L_X)
    b_q0 = s_q0.reshape([64, D0])
    b_k0 = s_k0.index(slot).reshape([BM, D0]).permute((1, 0))
    b_x = warpgroup_mma(b_q0, b_k0, b_start, use_acc=False, is_async=True)
    if D1 > 0:
        b_q1 = s_q1.reshape([64, D1])
        b_k1 = s_k1.index(slot).reshape([BM, D1]).permute((1, 0))
        b_x = warpgroup_mma(b_q1, b_k1, b_x, is_async=True)
    return b_x


@gluon.jit
def _weighted(
    b_p, s_v0, s_v1, slot, b_o0, b_o1,
    D0: gl.constexpr, D1: gl.constexpr, BM: gl.constexpr,
):  # fmt: skip
    b_v0 = s_v0.index(slot).reshape([BM, D0])
    b_o0 = warpgroup_mma(b_p, b_v0, b_o0, is_async=True)
    if D1 > 0:
        b_v1 = s_v1.index(slot).reshape([BM, D1])
        b_o1 = warpgroup_mma(b_p, b_v1, b_o1, is_async=True)
    return b_o0, b_o1


@gluon.jit
def _products(b_o0, b_o1, b_x, D1: gl.constexpr):
    """Wait for the products. What b_x becomes comes after, for the compiler too."""
    if D1 > 0:
        b_o0, b_o1, b_x = warpgroup_mma_wait(0, deps=(b_o0, b_o1, b_x))
    else:
        b_o0, b_x = warpgroup_mma_wait(0, deps=(b_o0, b_x))
    return b_o0, b_o1, b_x


@gluon.jit
def _consumer(
    p_o0, p_o1, p_qs,
    s_q0, s_q1, s_k0, s_k1, s_v0, s_v1, s_o0, s_o1, s_ks,
    q_full, q_empty, k_full, v_full, kv_empty, turn,
    N, M, H, G, n_tiles, scale,
    c: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr, BM: gl.constexpr, NC: gl.constexpr, STAGES: gl.constexpr,
    SHIFT: gl.constexpr, PINGPONG: gl.constexpr, KEYS: gl.constexpr,
):  # fmt: skip
    """64 rows against every key: the scores of block j + 1 are multiplied while the softmax of block j runs."""
    INT8: gl.constexpr = KEYS == 2
    BIAS: gl.constexpr = KEYS == 1
    # With three warpgroups the registers hold the weights of one block only: those of the block before have to be used
    # up before the exponentials start. With two they may take until the exponentials are done.
    EARLY: gl.constexpr = NC == 3
    QK_K: gl.constexpr = 32 if INT8 else 16
    L_X: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, QK_K])
    L_0: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D0, 16])
    D1_: gl.constexpr = D1 if D1 > 0 else 16
    L_1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D1_, 16])
    L_P: gl.constexpr = gl.DotOperandLayout(0, L_0, 2)
    L_R: gl.constexpr = gl.SliceLayout(1, L_X)
    dtype: gl.constexpr = s_v0.dtype
    n_blocks = (M + BM - 1) // BM
    b_q0 = s_q0.index(c)
    b_q1 = s_q1.index(c)
    i_kv = 0
    i_q = 0
    i_turn = 0
    for i_tile in range(gl.program_id(0), n_tiles, gl.num_programs(0)):
        i_b, i_h, _, i_n = _tile(i_tile, N, H, G, 64 * NC)
        i_n += 64 * c
        b_o0 = gl.zeros([64, D0], gl.float32, L_0)
        b_o1 = gl.zeros([64, D1_], gl.float32, L_1)
        if INT8:
            o_r = i_n + gl.arange(0, 64, layout=L_R)
            b_scale = (
                gl.load(p_qs + (i_b * H + i_h).to(gl.int64) * ((N + 3) // 4 * 4) + o_r, mask=o_r < N, other=0.0)
                * scale
            )
        else:
            b_scale = gl.full([64], 1.0 if BIAS else scale, gl.float32, L_R)
        mbarrier.wait(q_full.index(c), i_q & 1)
        slot = i_kv % STAGES
        mbarrier.wait(k_full.index(slot), (i_kv // STAGES) & 1)
        if PINGPONG:
            mbarrier.wait(turn.index(c), i_turn & 1)
        b_t = _scores(b_q0, b_q1, s_k0, s_k1, slot, D0, D1, BM, INT8, L_X)
        if PINGPONG:
            mbarrier.arrive(turn.index((c + 1) % NC), count=1)
            i_turn += 1
        b_x = warpgroup_mma_wait(0, deps=(b_t,))
        if KEYS != 0:
            b_ks = s_ks.index(slot).reshape([BM]).load(gl.SliceLayout(0, L_X))
        # These keys are free, and the values of the block before, here the last of another tile.
        mbarrier.arrive(kv_empty.index(slot), count=1)

        # The first block is the last of the keys, which may not be full.
        o_m = (n_blocks - 1) * BM + gl.arange(0, BM, layout=gl.SliceLayout(0, L_X))
        if INT8:
            b_x = b_x.to(gl.float32) * b_ks[None, :]
        elif BIAS:
            b_x = b_x * scale + b_ks[None, :]
        b_x = gl.where((o_m < M)[None, :], b_x * b_scale[:, None], float("-inf"))
        b_m = _row_max(b_x, L_R)
        b_top = b_m
        if BIAS:
            # All keys masked so far: any finite number keeps the exponents from being -inf - -inf.
            b_top = gl.where(b_m == float("-inf"), 0.0, b_m)
        b_e = gl.exp2(b_x - (b_top - SHIFT)[:, None])
        b_l = _partial_sums(b_e)
        b_p = gl.convert_layout(b_e.to(dtype), L_P)
        mbarrier.wait(v_full.index(slot), (i_kv // STAGES) & 1)

        for _ in range(1, n_blocks):
            v_slot = slot
            i_kv += 1
            slot = i_kv % STAGES
            mbarrier.wait(k_full.index(slot), (i_kv // STAGES) & 1)
            if PINGPONG:
                mbarrier.wait(turn.index(c), i_turn & 1)
            b_t = _scores(b_q0, b_q1, s_k0, s_k1, slot, D0, D1, BM, INT8, L_X)
            b_t0, b_t1 = _weighted(b_p, s_v0, s_v1, v_slot, b_o0, b_o1, D0, D1, BM)
            if PINGPONG:
                mbarrier.arrive(turn.index((c + 1) % NC), count=1)
                i_turn += 1
            b_x = warpgroup_mma_wait(2 if D1 > 0 else 1, deps=(b_t,))
            if KEYS != 0:
                b_ks = s_ks.index(slot).reshape([BM]).load(gl.SliceLayout(0, L_X))
            if INT8:
                b_x = b_x.to(gl.float32) * b_ks[None, :]
            elif BIAS:
                b_x = b_x * scale + b_ks[None, :]
            b_new = _larger(b_m, _row_max(b_x, L_R) * b_scale)
            b_top = b_new
            if BIAS:
                b_top = gl.where(b_new == float("-inf"), 0.0, b_new)
            if EARLY:
                # The loop in this wait keeps ptxas from moving the wait for the products up here.
                mbarrier.wait(v_full.index(slot), (i_kv // STAGES) & 1)
                b_o0, b_o1, b_x = _products(b_t0, b_t1, b_x, D1)
                mbarrier.arrive(kv_empty.index(slot), count=1)
            b_e = gl.exp2(b_x * b_scale[:, None] - (b_top - SHIFT)[:, None])
            b_old = gl.exp2(b_m - b_top)
            b_l = _scaled(b_l, b_old) + _partial_sums(b_e)
            b_m = b_new
            b_p = gl.convert_layout(b_e.to(dtype), L_P)
            if not EARLY:
                # The loop in this wait is what keeps ptxas from moving the exponentials behind the wait for the
                # products, which then would not run beside them.
                mbarrier.wait(v_full.index(slot), (i_kv // STAGES) & 1)
                b_o0, b_o1, b_p = _products(b_t0, b_t1, b_p, D1)
                mbarrier.arrive(kv_empty.index(slot), count=1)
            b_o0 = _scaled(b_o0, b_old)
            if D1 > 0:
                b_o1 = _scaled(b_o1, b_old)

        mbarrier.arrive(q_empty.index(c), count=1)
        i_q += 1
        b_t0, b_t1 = _weighted(b_p, s_v0, s_v1, slot, b_o0, b_o1, D0, D1, BM)
        i_kv += 1
        # The output tile of the turn before may still be on its way out of shared memory.
        tma.store_wait(0)
        if D1 > 0:
            b_o0, b_o1 = warpgroup_mma_wait(0, deps=(b_t0, b_t1))
        else:
            b_o0 = warpgroup_mma_wait(0, deps=(b_t0,))
        b_l = gl.sum(b_l, 1)
        b_rl = 1.0 / b_l
        if BIAS:
            b_rl = gl.where(b_l == 0.0, 0.0, b_rl)
        s_o0.index(c).reshape([64, D0]).store(_scaled(b_o0, b_rl).to(dtype))
        if D1 > 0:
            s_o1.index(c).reshape([64, D1]).store(_scaled(b_o1, b_rl).to(dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(p_o0, [i_b, i_n, i_h, 0], s_o0.index(c))
        if D1 > 0:
            tma.async_copy_shared_to_global(p_o1, [i_b, i_n, i_h, D0], s_o1.index(c))
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["N", "M", "H", "G", "n_tiles"])
def gqa_attention_hopper_fwd_kernel(
    p_q0, p_q1, p_k0, p_k1, p_v0, p_v1, p_o0, p_o1, p_qs, p_ks,
    N, M, H, G, n_tiles, scale,
    D0: gl.constexpr, D1: gl.constexpr, BM: gl.constexpr, NC: gl.constexpr, STAGES: gl.constexpr,
    SHIFT: gl.constexpr, PINGPONG: gl.constexpr, KEYS: gl.constexpr,
):  # fmt: skip
    """Tiles of 64 NC rows of one head against every key. KEYS: what p_ks has for each key: nothing, a bias, a scale.

    PINGPONG: the warpgroups issue their products in turns. scale includes log2(e). SHIFT: as in the other kernel.
    """
    QK_TYPE: gl.constexpr = p_q0.dtype
    PV_TYPE: gl.constexpr = p_v0.dtype
    QK_SIZE: gl.constexpr = QK_TYPE.primitive_bitwidth // 8
    PV_SIZE: gl.constexpr = PV_TYPE.primitive_bitwidth // 8
    s_q0 = gl.allocate_shared_memory(QK_TYPE, [NC, 1, 64, 1, D0], p_q0.layout)
    s_k0 = gl.allocate_shared_memory(QK_TYPE, [STAGES, 1, BM, 1, D0], p_k0.layout)
    s_v0 = gl.allocate_shared_memory(PV_TYPE, [STAGES, 1, BM, 1, D0], p_v0.layout)
    s_o0 = gl.allocate_shared_memory(PV_TYPE, [NC, 1, 64, 1, D0], p_o0.layout)
    if D1 > 0:
        s_q1 = gl.allocate_shared_memory(QK_TYPE, [NC, 1, 64, 1, D1], p_q1.layout)
        s_k1 = gl.allocate_shared_memory(QK_TYPE, [STAGES, 1, BM, 1, D1], p_k1.layout)
        s_v1 = gl.allocate_shared_memory(PV_TYPE, [STAGES, 1, BM, 1, D1], p_v1.layout)
        s_o1 = gl.allocate_shared_memory(PV_TYPE, [NC, 1, 64, 1, D1], p_o1.layout)
    else:
        s_q1 = s_q0
        s_k1 = s_k0
        s_v1 = s_v0
        s_o1 = s_o0
    if KEYS != 0:
        s_ks = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BM], p_ks.layout)
    else:
        s_ks = s_k0
    L_B: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [NC, 1], L_B)
    q_empty = gl.allocate_shared_memory(gl.int64, [NC, 1], L_B)
    turn = gl.allocate_shared_memory(gl.int64, [NC, 1], L_B)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], L_B)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], L_B)
    kv_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], L_B)
    for c in gl.static_range(NC):
        mbarrier.init(q_full.index(c), count=1)
        mbarrier.init(q_empty.index(c), count=1)
        mbarrier.init(turn.index(c), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(kv_empty.index(i), count=NC)
    fence_async_shared()
    if PINGPONG:
        mbarrier.arrive(turn.index(0), count=1)

    C0: gl.constexpr = 0
    C1: gl.constexpr = 1
    C2: gl.constexpr = 2
    if NC == 2:
        gl.warp_specialize(
            [
                (_consumer, (
                    p_o0, p_o1, p_qs,
                    s_q0, s_q1, s_k0, s_k1, s_v0, s_v1, s_o0, s_o1, s_ks,
                    q_full, q_empty, k_full, v_full, kv_empty, turn,
                    N, M, H, G, n_tiles, scale, C0, D0, D1, BM, NC, STAGES, SHIFT, PINGPONG, KEYS,
                )),
                (_consumer, (
                    p_o0, p_o1, p_qs,
                    s_q0, s_q1, s_k0, s_k1, s_v0, s_v1, s_o0, s_o1, s_ks,
                    q_full, q_empty, k_full, v_full, kv_empty, turn,
                    N, M, H, G, n_tiles, scale, C1, D0, D1, BM, NC, STAGES, SHIFT, PINGPONG, KEYS,
                )),
                (_producer, (
                    p_q0, p_q1, p_k0, p_k1, p_v0, p_v1, p_ks,
                    s_q0, s_q1, s_k0, s_k1, s_v0, s_v1, s_ks,
                    q_full, q_empty, k_full, v_full, kv_empty,
                    N, M, H, G, n_tiles, D0, D1, BM, NC, STAGES, KEYS, QK_SIZE, PV_SIZE,
                )),
            ],
            [4, 1], [240, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consumer, (
                    p_o0, p_o1, p_qs,
                    s_q0, s_q1, s_k0, s_k1, s_v0, s_v1, s_o0, s_o1, s_ks,
                    q_full, q_empty, k_full, v_full, kv_empty, turn,
                    N, M, H, G, n_tiles, scale, C0, D0, D1, BM, NC, STAGES, SHIFT, PINGPONG, KEYS,
                )),
                (_consumer, (
                    p_o0, p_o1, p_qs,
                    s_q0, s_q1, s_k0, s_k1, s_v0, s_v1, s_o0, s_o1, s_ks,
                    q_full, q_empty, k_full, v_full, kv_empty, turn,
                    N, M, H, G, n_tiles, scale, C1, D0, D1, BM, NC, STAGES, SHIFT, PINGPONG, KEYS,
                )),
                (_consumer, (
                    p_o0, p_o1, p_qs,
                    s_q0, s_q1, s_k0, s_k1, s_v0, s_v1, s_o0, s_o1, s_ks,
                    q_full, q_empty, k_full, v_full, kv_empty, turn,
                    N, M, H, G, n_tiles, scale, C2, D0, D1, BM, NC, STAGES, SHIFT, PINGPONG, KEYS,
                )),
                (_producer, (
                    p_q0, p_q1, p_k0, p_k1, p_v0, p_v1, p_ks,
                    s_q0, s_q1, s_k0, s_k1, s_v0, s_v1, s_ks,
                    q_full, q_empty, k_full, v_full, kv_empty,
                    N, M, H, G, n_tiles, D0, D1, BM, NC, STAGES, KEYS, QK_SIZE, PV_SIZE,
                )),
            ],
            [4, 4, 1], [160, 160, 24],
        )  # fmt: skip
