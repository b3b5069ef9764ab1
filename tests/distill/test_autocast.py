"""Mixed precision as a GPU has it, where autocast computes norms and softmax in float32 and matmuls in bfloat16."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

import diffattn
from diffattn.distill.pair import Pair
from diffattn.distill.settings import Settings
from diffattn.distill.trainable import make_trainable
from tests.distill import tiny
from tests.models.base import Rand

pytestmark = pytest.mark.filterwarnings("ignore:diffattn. .* another mechanism")
#: From the list of operations in torch's documentation of autocast; a CPU has none of them there.
FLOAT32_ON_CUDA = {"softmax", "log_softmax", "layer_norm", "group_norm", "exp", "sum", "prod", "norm", "pow", "cumsum"}


class AsOnCuda(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") not in FLOAT32_ON_CUDA or not torch.is_autocast_enabled("cpu"):
            return function(*args, **kwargs)
        low = (torch.bfloat16, torch.float16)
        args = [x.float() if isinstance(x, torch.Tensor) and x.dtype in low else x for x in args]
        return function(*args, **kwargs)


CORES = {
    "mqa": diffattn.GroupedQueryAttention(kv_heads=1),
    "mqa, svd": diffattn.GroupedQueryAttention(kv_heads=1, pooling="svd"),
    "elu1": diffattn.LinearAttention("elu1"),
    "softmax map": diffattn.LinearAttention("softmax"),
    "hedgehog": diffattn.LinearAttention("hedgehog", input_map="mlp"),
    "linfusion": diffattn.LinearAttention.linfusion(),
    "sparse": diffattn.SparseLinearAttention(block=16),
    "window": diffattn.WindowAttention(4),
}


@pytest.mark.parametrize("name", CORES)
def test_both_stages_have_gradients_near_those_of_float32(name):
    settings = Settings(mixed_precision="bf16", train="projections")
    found = []
    for enabled in (False, True):
        pipe = tiny.pipeline(sample_size=16)
        pipe.unet.requires_grad_(False)
        torch.manual_seed(0)
        handle = diffattn.patch(pipe, CORES[name])
        make_trainable(handle, settings)
        pair = Pair(pipe.unet, handle)
        rand = Rand(torch.Generator().manual_seed(1))
        inputs = dict(sample=rand(2, 4, 16, 16), timestep=torch.tensor([3, 500]), encoder_hidden_states=rand(2, 7, 16))
        with AsOnCuda(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss, layers = pair.model_losses(inputs)
            total = loss + layers.mean() + pair.layer_losses(inputs).mean()
        total.backward()
        # The sparse core's linear part has none on the layers of few tokens, which attend to all.
        gradients = [p.grad for s in pair.students.values() for p in s.parameters() if p.grad is not None]
        assert total.dtype == torch.float32 and len(gradients) >= 16 and all(g.isfinite().all() for g in gradients)
        found.append(torch.cat([g.flatten() for g in gradients]))
    exact, mixed = found
    # A direction to go in, not a figure: bfloat16 has 8 bits.
    assert torch.nn.functional.cosine_similarity(exact, mixed, dim=0) > 0.9
