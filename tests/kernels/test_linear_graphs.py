"""Linear attention as an operator: registered, compiled, exported; and what it says of bad input."""

import pytest
import torch

from diffattn import config
from diffattn.kernels import _backend
from diffattn.kernels.linear_attention import linear_attention, linear_attention_reference
from tests.kernels.linear_oracle import assert_close, make_inputs, make_rotary, run
from tests.kernels.test_linear_attention import heads_first

on_gpu = torch.cuda.is_available()


def op_arguments(device, feature_map, rotated, normalizer, E=16):
    q, k, v = (x.requires_grad_() for x in make_inputs(device, torch.float32, N=40, H=2, Hkv=1, D=16, E=E))
    q = heads_first(q.detach()).requires_grad_()
    cos, sin = make_rotary(device, 40, 16) if rotated else (None, None)
    return q, k, v, cos, sin, feature_map, normalizer, 1e-4


@pytest.mark.parametrize(
    ("feature_map", "rotated", "normalizer"), [("relu", True, "sum"), ("softmax", False, "sum"), (None, False, "mean")]
)
def test_opcheck(feature_map, rotated, normalizer, device, triton_backend):
    arguments = op_arguments(device, feature_map, rotated, normalizer)
    torch.library.opcheck(torch.ops.diffattn.linear_attention.default, arguments)
    arguments = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    o, state = torch.ops.diffattn.linear_attention(*arguments)
    grad = heads_first(torch.randn_like(o))
    q, k, v, cos, sin, *options = arguments
    torch.library.opcheck(
        torch.ops.diffattn.linear_attention_backward.default, (grad, q, k, v, cos, sin, state, *options)
    )


@pytest.mark.parametrize(
    ("feature_map", "rotated", "backend"),
    [("relu", True, "triton"), ("softmax", False, "triton"), ("softmax", True, "torch")],
)
def test_compiles_once(feature_map, rotated, backend, device, triton_backend):
    config.backend = backend
    torch._dynamo.reset()

    def f(q, k, v, rotary):
        return linear_attention(2 * q, k, v, feature_map=feature_map, rotary=rotary, normalizer="mean") + 1

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for N in (40, 33, 70):
            q, k, v = make_inputs(device, torch.float32, N=N, D=16)
            grad = torch.randn_like(q)
            rotary = make_rotary(device, N, 16) if rotated else None
            actual = run(lambda *qkv: compiled(*qkv, rotary), q, k, v, grad)  # noqa: B023
            expected = run(lambda *qkv: f(*qkv, rotary), q, k, v, grad)  # noqa: B023
            torch.testing.assert_close(actual, expected)


@pytest.mark.skipif(on_gpu, reason="about tensors on a CPU")
def test_operator_on_a_cpu_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(_backend, "_INTERPRETING", False)
    q, k, v = make_inputs("cpu", torch.float32, N=5, D=4)
    with pytest.raises(RuntimeError, match="needs a CUDA device"):
        torch.ops.diffattn.linear_attention(q, k, v, None, None, "relu", "sum", 1e-15)
    # the function does not need one
    assert linear_attention(q, k, v).isfinite().all()


def test_onnx_keeps_dead_rows_at_zero(tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")

    class Core(torch.nn.Module):
        def forward(self, q, k, v):
            return linear_attention(q, k, v), linear_attention(q, k, v, feature_map=None)

    q, k, v = make_inputs("cpu", torch.float32, N=16, H=2, Hkv=1, D=8)
    q[:, 3] = -1.0
    q, k = q.relu(), k.relu()
    length = {1: torch.export.Dim.DYNAMIC}
    path = str(tmp_path / "core.onnx")
    torch.onnx.export(Core(), (q, k, v), path, dynamo=True, dynamic_shapes=(length, length, length), verbose=False)
    session = onnxruntime.InferenceSession(path)
    for n in (16, 11):
        inputs = [x[:, :n] for x in (q, k, v)]
        names = [i.name for i in session.get_inputs()]
        outputs = session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
        for actual, expected in zip(outputs, Core()(*inputs), strict=True):
            torch.testing.assert_close(torch.from_numpy(actual), expected)


@pytest.mark.parametrize("config_backend", ["auto", "triton"])
def test_export_takes_torch(config_backend, device, triton_backend):
    config.backend = config_backend

    class Core(torch.nn.Module):
        def forward(self, q, k, v):
            return linear_attention(q, k, v)

    q, k, v = make_inputs(device, torch.float32, N=16, D=8)
    program = torch.export.export(Core(), (q, k, v))
    assert "diffattn" not in program.graph_module.code
    torch.testing.assert_close(program.module()(q, k, v), linear_attention(q, k, v))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_autocast_changes_nothing(backend, compiled, device, triton_backend):
    config.backend = backend
    q, k, v = make_inputs(device, torch.float32, N=40, D=16)
    f = torch.compile(linear_attention, fullgraph=True, backend="aot_eager") if compiled else linear_attention
    with torch.autocast(device, dtype=torch.bfloat16):
        o = f(q, k, v)
    assert_close([o], [linear_attention_reference(q.double(), k.double(), v.double())], torch.float32, ("o",))


def tensors(**changes):
    shapes = dict(q=(2, 6, 4, 8), k=(2, 6, 2, 8), v=(2, 6, 2, 5))
    return {name: changes.get(name, torch.zeros(shape)) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(q=[1.0]), TypeError, r"q: got list, expected a tensor \(B, N, H, D\)"),
        (dict(k=torch.zeros(2, 6, 2, 8, dtype=torch.int64)), TypeError, "k: got torch.int64, expected one of"),
        (dict(v=torch.zeros(2, 6, 5)), ValueError, r"v: got shape \(2, 6, 5\), expected \(B, M, Hkv, E\)"),
        (dict(k=torch.zeros(2, 6, 2, 8).half()), ValueError, "k: got torch.float16, expected torch.float32 as q"),
        (dict(v=torch.zeros(2, 6, 2, 5, device="meta")), ValueError, "v: on meta, expected cpu as q"),
        (dict(k=torch.zeros(1, 6, 2, 8)), ValueError, r"k: got shape \(1, 6, 2, 8\), expected \(2, M, Hkv, 8\)"),
        (dict(k=torch.zeros(2, 6, 2, 4)), ValueError, r"k: got shape \(2, 6, 2, 4\), expected \(2, M, Hkv, 8\)"),
        (dict(k=torch.zeros(2, 6, 3, 8)), ValueError, "k: got 3 heads, expected a divisor of the 4 heads of q"),
        (dict(v=torch.zeros(2, 7, 2, 5)), ValueError, r"v: got shape \(2, 7, 2, 5\), expected \(2, 6, 2\) \+ \(E,\)"),
        (dict(q=torch.zeros(2, 6, 4, 0)), ValueError, "at least one head and one feature"),
        (dict(feature_map="gelu"), ValueError, r"feature_map: got 'gelu', expected one of \('relu', 'elu1'"),
        (dict(normalizer="max"), ValueError, r"normalizer: got 'max', expected one of \('sum', 'mean'\)"),
        (dict(eps="0"), TypeError, "eps: got str, expected a number"),
        (dict(eps=-1.0), ValueError, "eps: got -1.0, expected 0 or more"),
        (dict(rotary=torch.zeros(6, 4)), TypeError, r"rotary: got Tensor, expected a pair of tensors \(cos, sin\)"),
        (dict(rotary=(torch.zeros(6, 4), None)), TypeError, "rotary: sin is NoneType, expected a tensor"),
        (dict(rotary=(torch.zeros(6, 8),) * 2), ValueError, r"rotary: cos has shape \(6, 8\), expected \(6, 4\) or"),
        (dict(rotary=(torch.zeros(6, 4), torch.zeros(2, 6, 4))), ValueError, "expected them alike"),
    ],
)
def test_bad_input(changes, error, message):
    options = {name: x for name, x in changes.items() if name not in ("q", "k", "v")}
    with pytest.raises(error, match=message):
        linear_attention(**tensors(**changes), **options)


def test_bad_rotary_lengths():
    angles = torch.zeros(6, 4)
    with pytest.raises(ValueError, match="rotary: got N = 6 queries and M = 7 keys, expected N = M"):
        linear_attention(**tensors(k=torch.zeros(2, 7, 2, 8), v=torch.zeros(2, 7, 2, 5)), rotary=(angles, angles))
    with pytest.raises(ValueError, match="rotary: q has 7 features, expected an even number"):
        linear_attention(**tensors(q=torch.zeros(2, 6, 4, 7), k=torch.zeros(2, 6, 2, 7)), rotary=(angles, angles))


def test_wide_heads_and_float64_take_torch(device):
    q, k, v = make_inputs(device, torch.float32, N=5, H=1, D=300)
    torch.testing.assert_close(linear_attention(q, k, v), linear_attention_reference(q, k, v))
    assert linear_attention(q.double(), k.double(), v.double()).dtype == torch.float64
