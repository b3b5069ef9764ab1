"""Every style of rotary table that diffusers has, as one."""

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from diffattn.cores import AttentionCore, LinearAttention, Rotary, SoftmaxAttention, apply_rotary
from diffattn.layers import find_layers
from diffattn.processors import rotary
from tests.models import BY_NAME
from tests.models.base import Rand

B, N, H, D = 2, 5, 3, 8


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


ANGLES = rand(N, D // 2, seed=1)
TWICE = (ANGLES.cos().repeat_interleave(2, -1), ANGLES.sin().repeat_interleave(2, -1))
AGAIN = (torch.cat((ANGLES, ANGLES), -1).cos(), torch.cat((ANGLES, ANGLES), -1).sin())
MATRICES = torch.stack((ANGLES.cos(), -ANGLES.sin(), ANGLES.sin(), ANGLES.cos()), -1).unflatten(-1, (2, 2))
X = rand(B, N, H, D)


@pytest.mark.parametrize(
    "ours",
    [
        rotary.from_pairs(TWICE),
        rotary.from_pairs([t[None] for t in TWICE]),
        rotary.from_pairs([t[None].expand(B, -1, -1) for t in TWICE]),
        rotary.from_pairs([t[None, :, None] for t in TWICE]),
        rotary.from_pairs([t[None, None] for t in TWICE]),
        rotary.from_complex(torch.polar(torch.ones_like(ANGLES), ANGLES)),
        rotary.from_complex(torch.polar(torch.ones_like(ANGLES), ANGLES)[None]),
        rotary.from_matrices(MATRICES[:, None]),
        rotary.from_matrices(MATRICES[None, :, None].expand(B, -1, -1, -1, -1, -1)),
        rotary.from_matrices(MATRICES[None, None]),
    ],
    ids=lambda r: f"{tuple(r.cos.shape)}",
)
def test_pairs_of_neighbours(ours):
    torch.testing.assert_close(apply_rotary(X, ours), apply_rotary_emb(X, TWICE, sequence_dim=1))


@pytest.mark.parametrize("ours", [rotary.from_halves(AGAIN), rotary.from_angles(torch.cat((ANGLES, ANGLES), -1))])
def test_pairs_of_halves(ours):
    stock = apply_rotary_emb(X, AGAIN, use_real_unbind_dim=-2, sequence_dim=1)
    torch.testing.assert_close(apply_rotary(X, ours), stock)


def test_nothing_stays_nothing():
    for convert in (rotary.from_pairs, rotary.from_complex, rotary.from_halves, rotary.from_angles):
        assert convert(None) is None
    assert rotary.join([None, None], [2, 3]) is None
    assert rotary.split(None, [2, 3]) == [None, None]


@pytest.mark.parametrize("batch", [(), (B,)])
def test_joined_tables_leave_the_rest_alone(batch):
    part = Rotary(ANGLES.cos().expand(*batch, N, -1), ANGLES.sin().expand(*batch, N, -1))
    joined = rotary.join([None, part, None], [2, N, 1])
    x = rand(B, N + 3, H, D, seed=2)
    expected = torch.cat((x[:, :2], apply_rotary(x[:, 2:-1], part), x[:, -1:]), dim=1)
    torch.testing.assert_close(apply_rotary(x, joined), expected)
    parts = rotary.split(joined, [2, N, 1])
    torch.testing.assert_close(parts[1].cos, part.cos)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("core", [SoftmaxAttention(), LinearAttention("elu1")], ids=["softmax", "linear"])
def test_angles_of_each_head(core, interleaved, masked):
    """The same as attention head by head."""
    q, k, v = (rand(B, N, H, D, seed=i) for i in range(3))
    angles = rand(1, N, H, D // 2, seed=4)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 1, 0]], dtype=torch.bool)[:, None, None] if masked else None
    of_heads = rotary.HeadRotary(angles.cos(), angles.sin(), interleaved)
    out = rotary.attend_by_head(core, q, k, v, (of_heads, None), mask=mask)
    for h in range(H):
        table = Rotary(angles[0, :, h].cos(), angles[0, :, h].sin(), interleaved)
        one = [t[:, :, h : h + 1] for t in (q, k, v)]
        torch.testing.assert_close(out[:, :, h : h + 1], core(*one, mask=mask, rotate=(table, table)))


def test_tables_of_unsplit_heads():
    """LTX rotates before the split into heads."""
    from diffusers.models.transformers.transformer_ltx import apply_rotary_emb as of_ltx

    angles = rand(1, N, H * D // 2, seed=5).repeat_interleave(2, -1)
    tables = (angles.cos(), angles.sin())
    stock = of_ltx(X.flatten(2), tables).unflatten(-1, (H, D))
    torch.testing.assert_close(rotary.heads_of(tables, H).rotate(X), stock)


# Models and pipelines that make their tables on the CPU, wherever the model is.


class OneDevice(TorchDispatchMode):
    """The meta device computes with tensors of the CPU where no GPU would: refuse that."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.dim()]
        devices = {t.device.type for t in tensors}
        assert len(devices) < 2 or "copy" in str(func) or "index" in str(func), f"{func} on {devices}"
        return func(*args, **(kwargs or {}))


class Looks(AttentionCore):
    """Computes nothing; rotates, by itself or before it."""

    def __init__(self, rotates_first):
        super().__init__()
        self.rotates_first = rotates_first
        self.rotations = 0

    def forward(self, q, k, v, *, mask=None, scale=None, rotate=None):
        if rotate is not None:
            assert all(t.device == q.device for r in rotate if r is not None for t in r[:2])
            self.rotations += 1
        return q.new_empty((*q.shape[:3], v.shape[3]))

    def config(self):
        return {}


def to_meta(x):
    return x.to("meta") if isinstance(x, torch.Tensor) else x


@pytest.mark.parametrize("rotates_first", [True, False])
@pytest.mark.parametrize(
    "name",
    [
        "CogView4Transformer2DModel",
        "EasyAnimateTransformer3DModel",
        "JoyImageEditTransformer3DModel",
        "StableAudioDiTModel",
    ],
)
def test_tables_of_the_cpu_come_along(name, rotates_first):
    """With the model on another device: the meta device, which every machine has."""
    tiny = BY_NAME[name]
    model = torch.nn.Module.to(tiny.model(), "meta")
    inputs = tiny.inputs(Rand(torch.Generator().manual_seed(0)))
    table = inputs.get("rotary_embedding")  # Stable Audio's pipeline makes it
    inputs = tree_map(to_meta, inputs)
    if table is not None:
        inputs["rotary_embedding"] = table
    core = Looks(rotates_first)
    for layer in find_layers(model):
        layer.install(layer.family(core))
    with OneDevice(), torch.no_grad():
        model(**inputs)
    assert bool(core.rotations) == (not rotates_first)
