"""What is minimised: each layer's error on the teacher's inputs, then the prediction's."""

import pytest
import torch

import diffattn
from diffattn.distill.pair import Pair, relative_error
from tests.distill import tiny
from tests.models.base import Rand
from tests.models.unets import unet_inputs

pytestmark = pytest.mark.filterwarnings("ignore:diffattn. .* another mechanism")


@pytest.fixture
def pair(pipe):
    pipe.unet.requires_grad_(False)
    return Pair(pipe.unet, diffattn.patch(pipe, diffattn.LinearAttention(tiny.LearnedMap())))


def inputs():
    return unet_inputs(Rand(torch.Generator().manual_seed(1)))


def parameters(pair, name):
    return list(pair.students[name].parameters())


def gradients(pair):
    found = {name: [p.grad.clone() for p in parameters(pair, name)] for name in pair.names}
    for processor in pair.students.values():
        processor.zero_grad()
    return found


def test_stage_1_has_the_gradient_of_each_layers_mse_computed_by_hand(pair):
    losses = pair.layer_losses(inputs())
    losses.sum().backward()
    found = gradients(pair)

    seen = {}
    with pair.teacher(), torch.no_grad():
        for name, layer in pair.layers.items():
            layer.attn.register_forward_hook(lambda attn, args, out, name=name: seen.update({name: (args, out)}))
        pair.denoiser(**inputs())
    assert len(seen) == len(pair.names) == len(losses) == 4
    for name, loss in zip(pair.names, losses, strict=True):
        args, expected = seen[name]
        out = pair.students[name](pair.layers[name].attn, *args)
        mse = torch.nn.functional.mse_loss(out, expected)
        by_hand = torch.autograd.grad(mse / expected.square().mean(), parameters(pair, name))
        torch.testing.assert_close(loss, mse / expected.square().mean())
        for one, other in zip(found[name], by_hand, strict=True):
            assert one.abs().max() > 0
            torch.testing.assert_close(one, other)


def test_one_pass_of_the_teacher_serves_all_layers_and_no_gradient_leaves_a_layer(pair):
    calls = []
    pair.denoiser.register_forward_hook(lambda *_: calls.append(1))
    pair.layer_losses(inputs())[-1].backward()
    assert len(calls) == 1
    assert all(not p.grad.any() for name in pair.names[:-1] for p in parameters(pair, name))
    assert all(p.grad.any() for p in parameters(pair, pair.names[-1]))


def test_stage_2_has_the_gradient_of_the_predictions_error_through_all_layers(pair):
    loss, layers = pair.model_losses(inputs())
    loss.backward()
    found = gradients(pair)

    with pair.teacher(), torch.no_grad():
        expected = pair.denoiser(**inputs()).sample
    mse = torch.nn.functional.mse_loss(pair.denoiser(**inputs()).sample, expected) / expected.square().mean()
    torch.testing.assert_close(loss, mse)
    mse.backward()
    for name in pair.names:
        for parameter, other in zip(parameters(pair, name), found[name], strict=True):
            assert other.abs().max() > 0
            torch.testing.assert_close(parameter.grad, other)
    assert layers.shape == (4,) and (layers > 0).all()


def test_gradient_checkpointing_changes_no_gradient(pair):
    pair.denoiser.train()
    sum(pair.model_losses(inputs())[1]).backward()
    plain = gradients(pair)
    pair.denoiser.enable_gradient_checkpointing()
    sum(pair.model_losses(inputs())[1]).backward()
    for name, values in gradients(pair).items():
        torch.testing.assert_close(values, plain[name])


def test_the_teacher_is_stock_and_the_student_comes_back(pipe):
    stock = dict(pipe.unet.attn_processors)
    with torch.no_grad():
        before = pipe.unet(**inputs()).sample
        pair = Pair(pipe.unet, diffattn.patch(pipe, "linear"))
        student = pipe.unet(**inputs()).sample
        with pair.teacher():
            assert dict(pipe.unet.attn_processors) == stock
            assert torch.equal(pipe.unet(**inputs()).sample, before)
        assert torch.equal(pipe.unet(**inputs()).sample, student)
    assert not torch.equal(student, before)


def test_a_teacher_is_its_own_perfect_student(pipe):
    pair = Pair(pipe.unet, diffattn.patch(pipe, diffattn.SoftmaxAttention(), layers="*attn1"))
    with torch.no_grad():
        assert pair.layer_losses(inputs()).max() == 0
        loss, layers = pair.model_losses(inputs())
    assert loss == 0 and layers.max() == 0


def test_layers_of_two_streams_count_both():
    one, other = torch.ones(2, 3), torch.full((2, 5), 2.0)
    assert relative_error((one, other), (one, other + 2)) == pytest.approx(4 * 10 / (6 + 16 * 10))
    assert relative_error((one, None), (one, None)) == 0


def test_a_layer_that_is_not_called_is_named(pair, pipe):
    unused = pipe.unet.mid_block.attentions[0].transformer_blocks[0]
    unused.forward = lambda hidden_states, **_: hidden_states
    with pytest.raises(ValueError, match=r"mid_block.attentions.0.*did not call"):
        pair.layer_losses(inputs())
