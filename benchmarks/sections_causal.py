"""The sections about causal linear attention, beside fla-core: forward, training, the recurrent step."""

import functools
from collections.abc import Callable

import cases
import peers
import torch
from candidates import Candidate, eager, ours, rand, relative
from sections_linear import LinearSection, capture
from torch import Tensor

from diffattn.kernels import LinearState, causal_linear_attention
from diffattn.kernels.causal_linear_attention import causal_linear_attention_reference, run_causal_linear_attention
from diffattn.kernels.causal_linear_attention.bidirectional import bidirectional_linear_attention_reference

# (decay, normalize) -> fla-core's function and our call of it
FLA = {
    (None, False): ("chunk_linear_attn", peers.fla_linear),
    (None, True): ("chunk_linear_attn", peers.fla_causal),
    ("head", False): ("chunk_retention", peers.fla_retention),
    ("token", False): ("chunk_simple_gla", peers.fla_simple_gla),
    ("channel", False): ("chunk_gla", peers.fla_gla),
}


class CausalSection(LinearSection):
    """Forward; the floor is q, k, v and the decays read and the output written at the copy rate.

    In eager mode a call with decays looks whether one is above 0, and waits for the GPU to know. "ours" is timed
    without that look, as compiled models and CUDA graphs run, since no peer looks; "ours, decay checked" with it.
    """

    decay_passes = 1

    def inputs(self, case: cases.Causal) -> tuple[Tensor, ...]:
        tensors = super().inputs(case)
        return tensors if case.decay is None else (*tensors, decay_of(case, tensors[0].device))

    def candidates(self, case: cases.Causal) -> dict[str, Candidate]:
        options = {"feature_map": "relu" if case.normalize else None, "normalize": case.normalize}
        name, peer = FLA[case.decay, case.normalize]
        found = {"ours": ours(functools.partial(unchecked, options), **options)}
        if case.decay is not None:
            found["ours, decay checked"] = ours(functools.partial(checked, options), **options)
            found["ours, both directions"] = ours(functools.partial(both_directions, options), **options, both=True)
        return found | {f"fla-core, {name}": eager(peer, **options)}

    def error(self, case, function, tensors, inputs, options) -> float:
        """Over the first and the last head of the first batch element."""
        expected = reference(*(part(x, case).double() for x in inputs), **options)
        return relative(part(function(*tensors), case), expected)

    def moved(self, case) -> int:
        return super().moved(case) + self.decay_passes * case.decays * 4


class CausalTrainingSection(CausalSection):
    """Forward and backward: of the decays too, where there is one a token, read twice and their gradient written."""

    passes, decay_passes, training = 11, 3, True

    def inputs(self, case):
        return tuple(x.requires_grad_(x.dim() > 1) for x in super().inputs(case))

    def call(self, case, function, tensors) -> Callable:
        grad = rand(case.B, case.N, case.H, case.D, seed=3)
        return lambda: gradients(function, tensors, grad)

    def error(self, case, function, tensors, inputs, options) -> float:
        """The largest of the gradients' errors."""
        grad = rand(case.B, case.N, case.H, case.D, seed=3)
        got = gradients(function, tensors, grad)
        wide = [part(x.detach(), case).double().requires_grad_(x.requires_grad) for x in inputs]
        expected = gradients(functools.partial(reference, **options), wide, part(grad, case).double())
        return max(relative(part(g, case), e) for g, e in zip(got, expected, strict=True))


class CausalStepSection(CausalSection):
    """One token at each of many layers, one after the other, replayed from a CUDA graph.

    The layers' states together are larger than the L2 cache, so each comes out of memory; the floor is that they,
    float32, are read and written once at the copy rate, "the states alone" a kernel of torch's that does that and no
    more. `one_state_ms` is a step where one state takes them all and stays in the cache.
    """

    layers = copies = 64

    def inputs(self, case):
        return *super().inputs(case), rand(case.B, case.H, case.D**2, seed=5).float()

    def candidates(self, case):
        def theirs(*tensors):
            return peers.fla_step, (*tensors[:-1], tensors[-1].unflatten(-1, (case.D, case.D)).clone())

        def alone(*tensors):
            return lambda state: state.mul_(0.999), (tensors[-1].clone(),)

        return {
            "ours": ours(step, with_state),
            "fla-core, fused_recurrent_simple_gla": Candidate(theirs),
            "the states alone": Candidate(alone, same=False),
        }

    def call(self, case, function, tensors):
        copies = [tuple(x.clone() for x in tensors) for _ in range(self.layers - 1)]
        return capture(function, [tensors, *copies])

    def more_calls(self, case, function, tensors):
        return {"one_state": capture(function, [tensors] * self.copies)}

    def error(self, case, function, tensors, inputs, options) -> float:
        """Of the output and of the state after the token, from the state that the calls before have left."""
        before = flat(tensors[-1]).double()
        out, state = function(*tensors)
        q, k, v, decay = (x.double() for x in tensors[:-1])
        expected = causal_linear_attention_reference(q, k, v, decay=decay, state=before, normalize=False)
        return max(relative(out, expected[0]), relative(flat(state), expected[1]))

    def moved(self, case):
        return self.layers * 2 * case.B * case.H * case.D**2 * 4


def decay_of(case: cases.Causal, device: torch.device) -> Tensor:
    """RetNet's decays (H,), or a gate's as GLA's layer makes them, logsigmoid over 16: (B, N, H) or (B, N, H, D)."""
    if case.decay == "head":
        return torch.log1p(-torch.exp2(-5.0 - torch.arange(case.H, device=device)))
    shape = (case.B, case.N, case.H) + (case.D,) * (case.decay == "channel")
    return torch.nn.functional.logsigmoid(rand(*shape, seed=4).float()) / 16


def unchecked(options: dict, q, k, v, decay=None) -> Tensor:
    return run_causal_linear_attention(q, k, v, decay, None, **options)


def checked(options: dict, q, k, v, decay) -> Tensor:
    return causal_linear_attention(q, k, v, decay=decay, **options)


def both_directions(options: dict, q, k, v, decay) -> Tensor:
    """`bidirectional_linear_attention` without its look at the decays."""
    keep = torch.is_grad_enabled()
    return torch.ops.diffattn.bidirectional_linear_attention(q, k, v, decay, **options, eps=0.0, block=1, keep=keep)[0]


def reference(q, k, v, decay=None, both: bool = False, **options) -> Tensor:
    if both:
        return bidirectional_linear_attention_reference(q, k, v, decay=decay, **options, eps=0.0, block=1)
    return causal_linear_attention_reference(q, k, v, decay=decay, **options)[0]


def gradients(function: Callable, tensors, grad: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(function(*tensors), [x for x in tensors if x.requires_grad], grad)


def part(x: Tensor, case: cases.Causal) -> Tensor:
    """The first and the last head, of the first batch element; heads do not see each other."""
    heads = [0, case.H - 1]
    return x[heads] if x.dim() == 1 else x[:1, :, heads]


def with_state(*tensors: Tensor) -> tuple:
    """The last of the tensors, (B, H, D D), as a `LinearState`."""
    *rest, flat_state = tensors
    state = LinearState(*flat_state.shape[:2], rest[0].shape[3], normalize=False, device=flat_state.device)
    state.tensor.copy_(flat_state)
    return *rest, state


def step(q, k, v, decay, state: LinearState) -> tuple[Tensor, Tensor]:
    return causal_linear_attention(q, k, v, decay=decay, state=state, normalize=False), state.tensor


def flat(state: LinearState | Tensor) -> Tensor:
    return state.tensor if isinstance(state, LinearState) else state.flatten(2)
