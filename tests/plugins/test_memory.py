"""A thousand denoising steps of a patched model keep nothing."""

import gc

import pytest
import torch

import diffattn
from tests.models.base import Rand
from tests.plugins.common import FLUX, SANA, learned

pytestmark = pytest.mark.filterwarnings("ignore:diffattn. .* another mechanism")


def held():
    """How many objects there are, and how many bytes the tensors among them hold."""
    gc.collect()
    objects = gc.get_objects()
    storages = {}
    for x in objects:
        # Of no other type: compilers, in tests before, leave tensors without a storage.
        if type(x) in (torch.Tensor, torch.nn.Parameter) and x.device.type == "cpu":
            storage = x.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return len(objects), sum(storages.values())


def denoise(tiny, model, steps):
    """Euler steps as a pipeline does them, from noise to nothing in particular."""
    from diffusers import EulerDiscreteScheduler

    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    inputs = tiny.inputs(Rand(torch.Generator().manual_seed(1)))
    sample = inputs["hidden_states"]
    with torch.no_grad():
        for time in scheduler.timesteps:
            scaled = scheduler.scale_model_input(sample, time)
            predicted = model(**inputs | dict(hidden_states=scaled, timestep=time.expand(len(sample)))).sample
            sample = scheduler.step(predicted, time, sample).prev_sample
    assert sample.isfinite().all()


def grown(tiny, model, steps):
    for _ in range(2):  # what is made once and kept
        denoise(tiny, model, 20)
        objects, tensors = held()
    denoise(tiny, model, steps)
    after = held()
    return after[0] - objects, after[1] - tensors


class Leaky(diffattn.SoftmaxAttention):
    """Keeps one number of each call."""

    kept: list[torch.Tensor] = []  # noqa: RUF012

    def forward(self, q, k, v, **options):
        self.kept.append(q.flatten()[0].clone())
        return super().forward(q, k, v, **options)


def test_a_thousand_steps_keep_nothing():
    model = FLUX.model()
    diffattn.patch(model, learned(16), layers="single*")
    diffattn.patch(model, "mqa", layers="transformer_blocks*")
    assert len(diffattn.status(model).installed) == 2
    objects, tensors = grown(FLUX, model, 1000)
    assert objects < 50 and tensors == 0


def test_the_exact_patch_keeps_nothing():
    model = SANA.model()
    diffattn.patch(model)
    objects, tensors = grown(SANA, model, 100)
    assert objects < 50 and tensors == 0


def test_what_a_core_keeps_would_be_seen():
    model = FLUX.model()
    diffattn.patch(model, Leaky(), layers="transformer_blocks*")
    objects, tensors = grown(FLUX, model, 100)
    Leaky.kept.clear()
    assert objects >= 100 and tensors >= 400
