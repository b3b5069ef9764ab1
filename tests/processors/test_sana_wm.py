"""SANA-WM's attention over frames: modules without a processor, and what stands in their place."""

import copy

import pytest
import torch

import diffattn
from diffattn.cores import FrameDeltaRule
from diffattn.layers import find_layers
from diffattn.processors.sana_wm import SanaWMCameraDeltaRuleProcessor, SanaWMDeltaRuleProcessor
from tests.models import BY_NAME

wm = pytest.importorskip("diffusers.models.transformers.transformer_sana_wm")

TINY = BY_NAME["SanaWMTransformer3DModel"]
B, T, S, H, D = 2, 3, 10, 2, 16


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def stock_and_ours(camera):
    if camera:
        return wm.SanaWMBidirectionalGDNCamAttention(), SanaWMCameraDeltaRuleProcessor(FrameDeltaRule(normalize=False))
    return wm.SanaWMBidirectionalGDNAttention(eps=1e-8), SanaWMDeltaRuleProcessor(FrameDeltaRule(eps=1e-8))


def arguments(camera, *, rotary=True, valid=None, beta_dims=4):
    """Of a module's forward, in float64: q, k, v first. Rays are poses, which also move.

    The camera's features are above 0: one that is 0 may keep its length, where the gradient jumps, and stock's too.
    """
    N = T * S
    q, k = torch.randn(2, B, N, H, D).double()
    q, k = (q.abs(), k.abs()) if camera else (q.relu(), k.relu())
    given = dict(query=q, key=k, value=torch.randn(B, N, H, D).double())
    width = D // 2 if camera else D
    freqs = torch.polar(torch.ones(()).double(), torch.randn(1, 1, N, width // 2).double()) if rotary else None
    if camera:
        poses = torch.eye(4).double().repeat(B, N, 1, 1)
        poses[..., :3, :3] = torch.linalg.qr(torch.randn(B, N, 3, 3).double()).Q
        poses[..., :3, 3] = torch.randn(B, N, 3).double()
        given["ray_transforms"] = (poses, poses.mT, wm._invert_SE3(poses), freqs)
    given |= dict(beta=torch.rand(B, H, T, S)[(..., 0)[: 5 - beta_dims]].double(), decay=torch.rand(B, H, T).double())
    if not camera:
        given |= dict(recall_gate=torch.zeros(1).double(), rotary_emb=freqs)
    given |= dict(num_frames=T)
    if valid is not None:
        tokens = valid.double()[:, :, None].expand(B, T, S).reshape(B, N)
        given |= dict(
            token_valid_mask=tokens,
            beta_valid_mask=valid.double()[:, None, :, None],
            decay_valid_mask=valid.double()[:, None],
        )
    return given


def cast(given, dtype):
    def one(x):
        if not isinstance(x, torch.Tensor):
            return tuple(map(one, x)) if isinstance(x, tuple) else x
        return x.to(torch.complex128 if dtype == torch.float64 else torch.complex64) if x.is_complex() else x.to(dtype)

    return {name: one(x) for name, x in given.items()}


def run(module, given, dtype):
    """Output and the gradients of q, k, v, beta and decay, in float64."""
    given = cast(given, dtype)
    names = ("query", "key", "value", "beta", "decay")
    for name in names:
        given[name].requires_grad_()
    out = module(**given)
    assert out.dtype == dtype and out.shape == (B, T * S, H * D)
    grad = torch.linspace(-1, 1, out.numel()).view(out.shape).sin().to(dtype)
    return [x.detach().double() for x in (out, *torch.autograd.grad(out, [given[n] for n in names], grad))]


def error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


FRAMES = torch.tensor([[True, True, True], [True, False, True]])


@pytest.mark.parametrize("camera", [False, True])
@pytest.mark.parametrize(
    "options",
    [dict(), dict(rotary=False), dict(valid=FRAMES), dict(beta_dims=3)],
    ids=["all", "flat", "mask", "frames"],
)
def test_computes_what_stock_computes(options, camera):
    """Output and gradients: stock's float32 and ours, each against ours in float64."""
    given = arguments(camera, **options)
    stock, ours = stock_and_ours(camera)
    exact = run(ours, given, torch.float64)
    for actual, theirs, expected in zip(
        run(ours, given, torch.float32), run(stock, given, torch.float32), exact, strict=True
    ):
        assert error(theirs, expected) <= 1e-5
        assert error(actual, expected) <= 1e-5


@pytest.mark.parametrize("camera", [False, True])
def test_in_bfloat16_it_errs_as_little_as_stock(camera):
    given = arguments(camera)
    stock, ours = stock_and_ours(camera)
    given = cast(given, torch.bfloat16)
    given["decay"] = given["decay"].float()  # as the model makes it
    exact = ours(**cast(given, torch.float64))
    theirs, actual = (error(module(**given).double(), exact) for module in (stock, ours))
    assert actual <= theirs


@pytest.mark.parametrize("camera", [False, True])
def test_under_autocast_it_errs_no_more_than_stock(camera):
    """Of projections in bfloat16, norms make queries and keys in float32 and leave values."""
    stock, ours = stock_and_ours(camera)
    given = cast(arguments(camera), torch.float32)
    given["value"] = given["value"].bfloat16()
    exact = ours(**cast(given, torch.float64))
    if camera:  # stock joins keys and values, and stays with the wider
        given["value"] = given["value"].float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs, actual = (module(**given) for module in (stock, ours))
    assert error(actual.double(), exact) <= error(theirs.double(), exact)
    if not camera:
        assert actual.dtype == theirs.dtype == torch.bfloat16


def test_training_under_autocast():
    """The whole model, weights in float32: output and gradients no further from float32 than stock's."""
    model = TINY.model()

    def results(**autocast):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, **autocast):
            out = TINY.run(model)
        out.square().mean().backward()
        return out.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    exact, theirs = results(enabled=False), results()
    diffattn.patch(model)
    for ours, stock, expected in zip(results(), theirs, exact, strict=True):
        assert error(ours, expected) <= 2 * error(stock, expected)


@pytest.mark.parametrize("camera", [False, True])
@pytest.mark.parametrize("core", [diffattn.SoftmaxAttention(), diffattn.LinearAttention()], ids=["softmax", "linear"])
def test_another_core_gets_no_masked_token(core, camera):
    given = cast(arguments(camera, valid=FRAMES), torch.float32)
    processor = type(stock_and_ours(camera)[1])(core)
    expected = processor(**given)
    hidden = given["token_valid_mask"] == 0
    for name in ("query", "key", "value"):
        given[name][hidden] = 7.0
    assert torch.equal(processor(**given), expected)
    assert not expected[hidden].any() and expected[~hidden].all()


def test_the_very_same_modules_come_back():
    model = TINY.model()
    layers = [layer for layer in find_layers(model) if layer.slot != "processor"]
    assert [layer.name for layer in layers] == [f"blocks.{i}.attn.{n}" for i in range(2) for n in ("attn", "cam_attn")]
    before, keys = [layer.processor for layer in layers], list(model.state_dict())
    order = [name for name, _ in model.named_modules()]
    handle = diffattn.patch(model)
    assert list(handle.installed) == [layer.name for layer in layers]
    assert all(model.get_submodule(name) is ours for name, ours in handle.installed.items())
    assert list(diffattn.status(model).installed) == list(handle.installed)
    assert list(model.state_dict()) == keys
    diffattn.patch(model)  # twice is once
    model.train()
    handle = diffattn.status(model)
    handle.undo()
    assert all(layer.processor is stock and stock.training for layer, stock in zip(layers, before, strict=True))
    assert [name for name, _ in model.named_modules()] == order


def test_one_of_the_two_alone():
    model = TINY.model()
    blocks = model.blocks
    handle = diffattn.patch(model, layers="blocks.0.attn.cam_attn")
    assert list(handle.installed) == ["blocks.0.attn.cam_attn"]
    assert type(blocks[0].attn.attn) is wm.SanaWMBidirectionalGDNAttention
    diffattn.patch(model, layers="blocks.0.attn.attn")
    stock = wm.SanaWMBidirectionalGDNAttention()
    blocks[0].attn.attn = stock  # by hand, over diffattn's
    assert "which replaced diffattn's" in diffattn.status(model).skipped["blocks.0.attn.attn"]
    diffattn.unpatch(model)
    assert blocks[0].attn.attn is stock
    assert type(blocks[0].attn.cam_attn) is wm.SanaWMBidirectionalGDNCamAttention


def test_a_failure_half_way_leaves_the_model_as_it_was(monkeypatch):
    model = TINY.model()
    before = [layer.processor for layer in find_layers(model)]
    monkeypatch.setattr(diffattn.patch.__globals__["Layer"], "install", fails_third(model))
    with pytest.raises(RuntimeError, match="third"):
        diffattn.patch(model)
    assert [layer.processor for layer in find_layers(model)] == before


def fails_third(model):
    from diffattn.layers import Layer

    install, calls = Layer.install, []

    def installs(layer, processor):
        calls.append(layer)
        if len(calls) == 3:
            raise RuntimeError("third")
        install(layer, processor)

    return installs


def test_a_copy_of_a_patched_model_is_patched():
    model = TINY.model()
    diffattn.patch(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(TINY.run(twin), TINY.run(model))
    diffattn.unpatch(twin)
    assert not diffattn.status(twin).installed and len(diffattn.status(model).installed) == 4


def test_lora_goes_on():
    """Its projections belong to the module around, which stays."""
    peft = pytest.importorskip("peft")
    model = TINY.model()
    config = peft.LoraConfig(r=2, target_modules=["qkv", "q_proj_cam", "proj"], init_lora_weights=False)
    with torch.no_grad():
        bare = TINY.run(model)
        diffattn.patch(model)
        peft.inject_adapter_in_model(config, model)
        ours = TINY.run(model)
        diffattn.unpatch(model)
        stock = TINY.run(model)
    assert error(ours, stock) <= 1e-5 < error(bare, stock)


@pytest.mark.parametrize("patch_first", [True, False])
@pytest.mark.parametrize("how", ["accelerate", "leaf_level", "block_level", "float8"])
def test_offloaded_and_cast_weights(how, patch_first):
    model, cpu = TINY.model(), torch.device("cpu")
    if patch_first:
        diffattn.patch(model)
    if how == "accelerate":
        pytest.importorskip("accelerate").cpu_offload(model, cpu)
    elif how == "float8":
        model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    else:
        blocks = {"num_blocks_per_group": 1} if how == "block_level" else {}
        model.enable_group_offload(cpu, cpu, offload_type=how, **blocks)
    if not patch_first:
        diffattn.patch(model)
    with torch.no_grad():
        ours = TINY.run(model)
        diffattn.unpatch(model)
        assert error(ours, TINY.run(model)) <= 1e-5


def first_call(model):
    calls = []
    handle = model.blocks[0].register_forward_pre_hook(lambda _, args: calls.append(args))
    with torch.no_grad():
        TINY.run(model)
    handle.remove()
    return calls[0]


def test_a_block_is_one_graph():
    """Compiled before it is patched, and after: what was compiled for stock is not run again."""
    model, graphs = TINY.model(), []
    block, args = model.blocks[0], first_call(model)

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    with torch.no_grad():
        stock = compiled(*args)
        diffattn.patch(model)
        ours = compiled(*args)
        assert len(graphs) == 2 and not torch.equal(ours, stock)
        assert error(ours, block(*args)) <= 1e-6
        compiled(*args)
        diffattn.unpatch(model)
        assert torch.equal(compiled(*args), stock) and len(graphs) == 2


@pytest.mark.parametrize("camera", [False, True])
def test_gradients_through_a_compiler(camera):
    """Of the attention alone: torch 2.13's aot_eager fails in the backward of the module around, stock's and ours."""
    given, ours = arguments(camera), stock_and_ours(camera)[1]
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    results = (run(f, given, torch.float32) for f in (compiled, ours))
    for actual, expected in zip(*results, strict=True):
        assert error(actual, expected) <= 1e-6


def test_a_padded_video_gives_what_stock_gives():
    model = TINY.model()
    with torch.no_grad():
        for mask in (FRAMES, FRAMES[:, None], FRAMES[:, None, :, None, None]):
            stock = TINY.run(model, frame_valid_mask=mask)
            with diffattn.patched(model):
                assert error(TINY.run(model, frame_valid_mask=mask), stock) <= 1e-5


def test_what_does_not_fit_is_refused():
    given = cast(arguments(False), torch.float32)
    with pytest.raises(ValueError, match="one table for all heads"):
        SanaWMDeltaRuleProcessor()(**given | dict(rotary_emb=given["rotary_emb"].expand(1, H, -1, -1)))
    q = torch.randn(1, 4, 2, 8)
    with pytest.raises(ValueError, match="expected gates"):
        FrameDeltaRule()(q, q, q)
    gates = dict(beta=torch.rand(1, 4, 2), kept=torch.rand(1, 2, 2))
    with pytest.raises(ValueError, match="mask: got shape"):
        FrameDeltaRule()(q, q, q, mask=torch.ones(1, 1, 1, 4, dtype=torch.bool), **gates)
    with pytest.raises(ValueError, match="same rotation"):
        table = diffattn.kernels.Rotary(torch.ones(4, 4), torch.zeros(4, 4))
        FrameDeltaRule()(q, q, q, rotate=(table, None), **gates)
    with pytest.raises(ValueError, match="eps"):
        FrameDeltaRule(eps=-1.0)
    with pytest.raises(ValueError, match="key/value heads"):
        FrameDeltaRule().check(4, 2)
