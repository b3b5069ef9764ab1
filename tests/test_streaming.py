"""A stream computes what the model computes of all frames at once, however they are cut."""

import copy
import threading
import warnings

import pytest
import torch
from torch import nn

import diffattn
from diffattn import CausalLinearAttention, GroupedQueryAttention, LinearAttention, SoftmaxAttention
from diffattn.cores import Rotary
from diffattn.streaming import streaming
from tests.models import BY_NAME

BAR = 1e-5
CUTS = [(1,) * 7, (3, 3, 1), (7,), (1, 3, 2, 1)]
in_each_dtype = pytest.mark.parametrize(
    ("dtype", "bar"), [(torch.float32, BAR), (torch.bfloat16, 5e-3)], ids=["float32", "bfloat16"]
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def float32_is_float32():
    """A GPU's convolutions round float32 to TF32 otherwise."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def relative(actual, expected):
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).norm() / expected.norm()).item()


# A bare core


def rotation(first, n, D=8, device="cpu"):
    angles = torch.arange(first, first + n, device=device)[:, None] * 0.3 ** torch.arange(D // 2, device=device)
    return (Rotary(angles.cos(), angles.sin()),) * 2


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("rotated", [False, True])
@in_each_dtype
def test_bare_core(dtype, bar, rotated, cut, device):
    core = CausalLinearAttention("elu1", decay="retention", block=4)
    q, k, v = torch.randn(3, 2, 28, 2, 8).to(device, dtype).unbind()
    whole = core(q, k, v, rotate=rotation(0, 28, device=device) if rotated else None)
    with streaming(core, None) as stream:
        outs, first = [], 0
        for n in cut:
            part = slice(4 * first, 4 * (first + n))
            rotate = rotation(4 * first, 4 * n, device=device) if rotated else None
            outs.append(stream(q[:, part], k[:, part], v[:, part], rotate=rotate, frame_index=first))
            first += n
    assert relative(torch.cat(outs, 1), whole) <= bar
    assert torch.equal(core(q, k, v, rotate=rotation(0, 28, device=device) if rotated else None), whole)


# A model of tokens in a row


class Block(nn.Module):
    def __init__(self, core):
        super().__init__()
        self.norm, self.qkv, self.out, self.core = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16), core
        self.feed = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (2, 8)) for t in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + self.out(self.core(q, k, v).flatten(2))
        return x + self.feed(x)


def sequence_model(*cores):
    return nn.Sequential(*map(Block, cores)).eval()


def run_cut(stream, x, cut, unit=1, dim=1):
    return torch.cat([stream(part) for part in x.split([n * unit for n in cut], dim)], dim)


@pytest.mark.parametrize("cut", CUTS)
@in_each_dtype
def test_sequence_model(dtype, bar, cut, device):
    model = sequence_model(CausalLinearAttention("elu1"), CausalLinearAttention(decay=[-0.1, -1.0])).to(device, dtype)
    x = torch.randn(2, 7, 16).to(device, dtype)
    whole = model(x)
    with streaming(model, None) as stream:
        assert relative(run_cut(stream, x, cut), whole) <= bar
        stream.reset()
        assert relative(run_cut(stream, x[:1], cut), whole[:1]) <= bar


@pytest.mark.parametrize("core", [SoftmaxAttention(), GroupedQueryAttention()])
@pytest.mark.parametrize("cut", CUTS)
def test_softmax_keeps_a_sink_and_a_window(core, cut):
    """Against a mask over the whole sequence: frame n sees itself, 2 before it, and the first."""
    model = sequence_model(CausalLinearAttention("elu1", block=3), core)
    x = torch.randn(2, 21, 16)
    frame = torch.arange(21) // 3
    n, m = frame[:, None], frame[None, :]
    mask = (m <= n) & ((n - m < 3) | (m < 1))
    q, k, v = (t.unflatten(-1, (2, 8)) for t in model[1].qkv(model[1].norm(model[0](x))).chunk(3, -1))
    y = model[0](x) + model[1].out(core(q, k, v, mask=mask[None, None]).flatten(2))
    whole = y + model[1].feed(y)
    with streaming(model, None, window=3, sink=1) as stream:
        assert relative(run_cut(stream, x, cut, unit=3), whole) <= BAR
        # what the next frame will see: the first and the last two
        assert stream.dropped == {"1.core": 4}
        assert "keys and values of 3 frames, 4 dropped" in str(stream)


def test_memory_of_softmax_is_bounded():
    model = sequence_model(SoftmaxAttention())
    with streaming(model, window=4, sink=2) as stream:
        for _ in range(30):
            stream(torch.randn(1, 1, 16))
            assert stream.memory[model[0].core]["k"].shape[1] <= 2 + 3
        assert stream.dropped["0.core"] == 30 - 5


# SANA-Video


def sana(**changes):
    """The tiny SANA-Video with causal self-attention: 16 tokens a frame."""
    tiny = BY_NAME["SanaVideoTransformer3DModel"]
    model = tiny.model() if not changes else type(tiny.model())(**{**tiny.config, **changes}).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        diffattn.patch(model, CausalLinearAttention("relu", block=16), layers="*attn1")
    return model


def sana_inputs(frames, batch=2):
    generator = torch.Generator().manual_seed(1)
    video = torch.randn(batch, 4, frames, 8, 8, generator=generator)
    text = torch.randn(batch, 7, 16, generator=generator)
    return video, dict(encoder_hidden_states=text, timestep=torch.tensor([3, 500])[:batch], return_dict=False)


def run_sana(stream, video, cut, **inputs):
    return torch.cat([stream(part, **inputs)[0] for part in video.split(list(cut), 2)], 2)


@pytest.fixture(scope="module")
def sana_video():
    return sana()


@pytest.mark.parametrize("cut", CUTS)
@in_each_dtype
def test_sana_video(dtype, bar, cut, device):
    """Against the model itself on all frames, without the tap of its temporal convolutions that looks ahead."""
    model = sana().to(device, dtype)
    video, inputs = sana_inputs(7)
    video, text = (x.to(device, dtype) for x in (video, inputs["encoder_hidden_states"]))
    inputs |= dict(encoder_hidden_states=text, timestep=inputs["timestep"].to(device))
    blind = copy.deepcopy(model)
    for block in blind.transformer_blocks:
        block.ff.conv_temp.weight[:, :, 2] = 0
    whole = blind(video, **inputs)[0]
    before = model(video, **inputs)[0]
    # the tap and the order of frames matter, or there would be nothing to see here
    assert relative(before, whole) > 2.5e-2
    with streaming(model, None) as stream:
        assert relative(run_sana(stream, video, cut, **inputs), whole) <= bar
        assert stream.frames == 7
        assert len(stream.states) == 2
    assert torch.equal(model(video, **inputs)[0], before)


@pytest.mark.parametrize("cut", [(1,) * 7, (3, 3, 1)])
def test_wan(cut):
    """Against the model itself: Wan has nothing but attention that mixes frames."""
    model = BY_NAME["WanTransformer3DModel"].model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        diffattn.patch(model, CausalLinearAttention("elu1", block=4))
    inputs = dict(encoder_hidden_states=torch.randn(2, 7, 16), timestep=torch.tensor([3, 500]), return_dict=False)
    video = torch.randn(2, 4, 7, 4, 4)
    whole = model(video, **inputs)[0]
    with streaming(model, None) as stream:
        assert relative(run_sana(stream, video, cut, **inputs), whole) <= BAR


def test_sana_video_beyond_its_rotary_table():
    """The table of the tiny model has 32 rows, its twin's 64."""
    short, long = sana(), sana(rope_max_seq_len=64)
    long.load_state_dict(short.state_dict())
    video, inputs = sana_inputs(40, batch=1)
    with streaming(short, 4) as stream, streaming(long, None) as at_once:
        expected = at_once(video, **inputs)[0]
        assert relative(run_sana(stream, video, (4,) * 10, **inputs), expected) <= BAR


def test_states_stay_in_place(sana_video):
    video, inputs = sana_inputs(6)
    with streaming(sana_video) as stream:
        places = []
        for frame in video.split(1, 2):
            stream(frame, **inputs)
            places.append([x.data_ptr() for s in stream.states.values() for x in s.tensors()])
        assert all(p == places[0] for p in places)


def test_denoising_steps_leave_no_trace(sana_video):
    video, inputs = sana_inputs(4)
    with streaming(sana_video) as plain, streaming(sana_video) as other:
        for i, frame in enumerate(video.split(1, 2)):
            expected = plain(frame, **inputs)[0]
            other(torch.randn_like(frame), **inputs, keep=False)
            assert other.frames == i
            assert torch.equal(other(frame, **inputs)[0], expected)


def test_going_back(sana_video):
    video, inputs = sana_inputs(4)
    frames = video.split(1, 2)
    with streaming(sana_video) as stream, streaming(sana_video) as other:
        stream(frames[0], **inputs)
        saved = stream.save()
        expected = [stream(f, **inputs)[0] for f in frames[1:]]
        stream.load(saved)
        other.load(saved)
        assert stream.frames == other.frames == 1
        for f, e in zip(frames[1:], expected, strict=True):
            assert torch.equal(stream(f, **inputs)[0], e)
            assert torch.equal(other(f, **inputs)[0], e)


def test_two_streams_do_not_mix(sana_video):
    """In turns, and in threads; outside of them the model has no memory."""
    one, inputs = sana_inputs(5)
    two = one.flip(2)
    with streaming(sana_video) as stream:
        expected = [run_sana(stream, one, (1,) * 5, **inputs)]
        stream.reset()
        expected.append(run_sana(stream, two, (1,) * 5, **inputs))
    stateless = sana_video(one[:, :, :1], **inputs)[0]
    with streaming(sana_video) as a, streaming(sana_video) as b:
        outs = [[], []]
        for frames in zip(one.split(1, 2), two.split(1, 2), strict=True):
            for out, stream, frame in zip(outs, (a, b), frames, strict=True):
                out.append(stream(frame, **inputs)[0])
            assert torch.equal(sana_video(one[:, :, :1], **inputs)[0], stateless)
        assert all(torch.equal(torch.cat(o, 2), e) for o, e in zip(outs, expected, strict=True))
    with streaming(sana_video) as a, streaming(sana_video) as b:
        results = [None, None]

        def work(i, stream, video):
            with torch.no_grad():
                results[i] = run_sana(stream, video, (1,) * 5, **inputs)

        threads = [threading.Thread(target=work, args=a) for a in ((0, a, one), (1, b, two))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(r, e) for r, e in zip(results, expected, strict=True))


# Bad input


def memory(stream):
    return [x.clone() for s in stream.states.values() for x in s.tensors()]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, v, i: s(v[:, :, :1], **i, frame_index=0), "frame_index: got 0, expected 1"),
        (lambda s, v, i: s(v[:, :, :2], **i), "got 2 frames, expected 1"),
        (lambda s, v, i: s(v[:1, :, :1], **i), "got frames of batch 1, expected 2"),
        (lambda s, v, i: s(v[:, :, :1, :4], **i), "got frames of size"),
        (lambda s, v, i: s(v[:, :, :1].double(), **i), "got frames of dtype torch.float64"),
        (lambda s, v, i: s(v[:, :, :1].to("meta"), **i), "got frames of device meta"),
        (lambda s, v, i: s(None, **i), "got NoneType for the model's first argument"),
    ],
)
def test_refused_calls_change_nothing(call, message, sana_video):
    video, inputs = sana_inputs(3)
    with streaming(sana_video) as stream:
        stream(video[:, :, :1], **inputs)
        before = memory(stream)
        with pytest.raises((TypeError, ValueError), match=message):
            call(stream, video, inputs)
        assert all(torch.equal(a, b) for a, b in zip(before, memory(stream), strict=True))
        assert stream.frames == 1
        stream(video[:, :, 1:2], **inputs)


def test_a_call_that_breaks_off_ends_the_stream():
    model = sequence_model(CausalLinearAttention("elu1"), CausalLinearAttention("elu1"))
    x = torch.randn(1, 1, 16)
    with streaming(model) as stream:
        stream(x)
        feed, model[0].feed = model[0].feed, nn.Linear(3, 3)
        with pytest.raises(RuntimeError, match="mat1"):
            stream(x)
        model[0].feed = feed
        with pytest.raises(RuntimeError, match="failed half-way"):
            stream(x)
        stream.reset()
        stream(x)


def test_a_closed_stream():
    model = sequence_model(CausalLinearAttention("elu1"))
    with streaming(model) as stream:
        pass
    with pytest.raises(RuntimeError, match="its context has ended"):
        stream(torch.randn(1, 1, 16))
    assert "forward" not in vars(model[0].core)


def test_wrong_tokens_a_frame():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = BY_NAME["SanaVideoTransformer3DModel"].model()
        diffattn.patch(model, CausalLinearAttention("relu", block=8), layers="*attn1")
    video, inputs = sana_inputs(1)
    with streaming(model) as stream, pytest.raises(ValueError, match="got 16 tokens for 1 frames, expected 8"):
        stream(video, **inputs)


class Convolved(nn.Module):
    def __init__(self):
        super().__init__()
        self.core, self.conv = CausalLinearAttention("elu1"), nn.Conv1d(4, 4, 3)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: sequence_model(CausalLinearAttention(), LinearAttention()),
            "1.core .LinearAttention.* sees all tokens",
        ),
        (lambda: sequence_model(SoftmaxAttention()), "window: got None, expected the number of frames"),
        (lambda: nn.Linear(3, 3), "has no attention that could remember"),
        (lambda: BY_NAME["SanaVideoTransformer3DModel"].model(), "it looks ahead"),
        (lambda: BY_NAME["LTXVideoTransformer3DModel"].model(), "got LTXVideoTransformer3DModel, expected one of"),
        (Convolved, "conv .a convolution over time"),
        (lambda: sequence_model(CausalLinearAttention(), CausalLinearAttention(block=2)), r"\[1, 2\] tokens a frame"),
        (lambda: "model", "model: got str"),
    ],
)
def test_models_that_cannot_stream(model, message):
    with pytest.raises((TypeError, ValueError), match=message), streaming(model()):
        pass


@pytest.mark.parametrize("options", [dict(frames_per_chunk=0), dict(window=0), dict(sink=-1), dict(time_dim="1")])
def test_bad_options(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}: got"), streaming(CausalLinearAttention(), **options):
        pass


class Rows(nn.Module):
    """Attention over tokens (B, N, C), or (N, B, C) where `turned`."""

    def __init__(self, core, turned=False):
        super().__init__()
        self.qkv, self.core, self.turned = nn.Linear(16, 48), core, turned

    def forward(self, x):
        x = x.transpose(0, 1) if self.turned else x
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).unbind(2)
        out = self.core(q, k, v).flatten(2)
        return out.transpose(0, 1) if self.turned else out


@pytest.mark.parametrize("options", [{}, dict(keep=False)], ids=["kept", "tried"])
def test_a_first_call_that_fails_leaves_the_stream_open(options):
    """Before the first layer with a memory nothing has happened, so any frames may come next."""
    with streaming(Rows(CausalLinearAttention("elu1", block=4))) as stream:
        for wrong in (torch.randn(2, 4, 15), torch.randn(2, 4, 16).double()):
            with pytest.raises(RuntimeError, match="mat1"):
                stream(wrong, **options)
        if options:
            stream(torch.randn(3, 4, 16), **options)
        stream(torch.randn(2, 4, 16))
        assert stream.frames == 1


def test_frames_along_another_dimension():
    model = Rows(CausalLinearAttention("elu1", block=1), turned=True)
    tokens = torch.randn(6, 2, 16)
    whole = model(tokens)
    for dim in (0, -3):
        with streaming(model, 2, time_dim=dim) as stream:
            parts = [stream(part) for part in tokens.split(2)]
        assert relative(torch.cat(parts), whole) <= BAR
    for dim in (3, -4):
        with streaming(model, 2, time_dim=dim) as stream, pytest.raises(ValueError, match=f"time_dim: got {dim}, exp"):
            stream(tokens[:2])


def test_two_layers_with_one_core():
    core = CausalLinearAttention("elu1", block=4)
    with streaming(nn.Sequential(Rows(core), Rows(core))) as stream:
        with pytest.raises(RuntimeError, match=r"0\.core was called twice for the same frames"):
            stream(torch.randn(2, 4, 16))


@pytest.mark.parametrize("core", [CausalLinearAttention("elu1"), SoftmaxAttention()], ids=["causal", "softmax"])
def test_a_frame_is_trained_at_a_time(core):
    """What is remembered holds no graph: gradients stay within the call."""
    model = Rows(core)
    with torch.enable_grad(), streaming(model, window=3) as stream:
        for frame in torch.randn(2, 4, 16).split(1, 1):
            stream(frame).square().sum().backward()
    assert model.qkv.weight.grad.isfinite().all()
