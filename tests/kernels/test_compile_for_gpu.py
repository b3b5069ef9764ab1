"""The interpreter accepts what Triton's compiler does not: kernels are compiled for a GPU that need not be there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "family, arch",
    [
        ("linear", 90),
        ("gqa", 90),
        ("gqa_hopper", 90),
        ("causal", 90),
        ("block_sparse", 90),
        ("frame_delta_rule", 90),
        ("qk_norm_rope", 90),
        ("linear", 89),
        ("gqa", 89),
        ("causal", 89),
        ("block_sparse", 89),
        ("frame_delta_rule", 89),
    ],
    ids=str,
)
def test_kernels_compile_and_fit(family, arch, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).with_name("compile_for_gpu.py")
    done = subprocess.run([sys.executable, script, family, str(arch)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok" in done.stdout
