"""What `import diffattn` needs and brings in."""

import subprocess
import sys

import pytest


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_import_brings_in_torch_and_nothing_else_that_is_heavy():
    heavy = ["diffusers", "transformers", "triton", "onnx", "onnxruntime", "typer", "PIL", "safetensors"]
    brought = python(
        "import torch, sys; before = set(sys.modules); import diffattn;"
        f"print([m for m in {heavy} if m in set(sys.modules) - before])"
    )
    assert brought == "[]"


def test_works_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None;"
        "import torch, diffattn;"
        "x = torch.randn(1, 5, 2, 4);"
        "o = diffattn.kernels.linear_attention(x, x, x) + diffattn.kernels.gqa_attention(x, x, x);"
        "diffattn.config.backend = 'triton'\n"
        "try: diffattn.kernels.linear_attention(x, x, x)\n"
        "except RuntimeError as error: print(error)"
    )
    assert "DIFFATTN_BACKEND=triton was asked for, but triton is not installed" in python(code)


def test_compilers_that_kernels_are_not_written_for(monkeypatch):
    import torch

    from diffattn import config
    from diffattn.kernels import _backend, linear_attention

    x = torch.randn(1, 5, 2, 4)
    monkeypatch.setattr(_backend, "_INTERPRETING", False)
    monkeypatch.setattr(_backend, "_TRITON", (3, 3))
    assert linear_attention(x, x, x).isfinite().all()
    monkeypatch.setattr(config, "backend", "triton")
    with pytest.raises(RuntimeError, match=r"triton is 3\.3 and the kernels need 3\.4 or newer"):
        linear_attention(x, x, x)
    # one that does not say its version may be newer
    monkeypatch.setattr(_backend, "_TRITON", ())
    with pytest.raises(RuntimeError, match="on cpu"):
        linear_attention(x, x, x)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(RuntimeError, match="this torch is for AMD GPUs"):
        linear_attention(x, x, x)


def test_a_gpu_that_is_too_old_takes_plain_torch(monkeypatch):
    import torch
    from torch._subclasses import FakeTensorMode

    from diffattn import config
    from diffattn.kernels import _backend

    monkeypatch.setattr(_backend, "_INTERPRETING", False)
    monkeypatch.setattr(_backend, "_TRITON", _backend.OLDEST_TRITON)
    monkeypatch.setattr(_backend, "_gpus", {})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with FakeTensorMode():
        x = torch.empty(1, 5, 2, 4, device="cuda")
    assert not _backend.use_triton(x)
    # compilers trace no question about a device
    torch.compiler.reset()
    compiled = torch.compile(lambda y: y + (_backend._why_not_gpu(1) is None), fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1)) == 0
    monkeypatch.setattr(config, "backend", "triton")
    with pytest.raises(RuntimeError, match=r"compute capability 8\.0 or more, and Tesla T4 has 7\.5"):
        _backend.use_triton(x)
    monkeypatch.setattr(_backend, "_gpus", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert _backend.use_triton(x)


@pytest.mark.parametrize("name, value", [("backend", "cuda"), ("compile", "always"), ("speed", 11)])
def test_config_refuses_what_it_does_not_know(name, value):
    from diffattn import config

    before = repr(config)
    with pytest.raises((ValueError, AttributeError), match=name):
        setattr(config, name, value)
    assert repr(config) == before


def test_public_names():
    import diffattn

    assert all(hasattr(diffattn, name) for name in diffattn.__all__)
