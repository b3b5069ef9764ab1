"""What is recorded while the teacher draws, and where it is kept."""

import json

import pytest
import torch

from diffattn.distill.trajectories import Recording, Sampling, TrajectoryError, address, fingerprint, record
from tests.distill import tiny

SAMPLING = Sampling(tiny.PROMPTS, **tiny.SAMPLING)


def calls_of(pipe, sampling=SAMPLING):
    """The denoiser's inputs in the pipeline's own calls, heard by other means."""
    heard = []

    def hear(module, args, kwargs):
        heard.append({"sample": args[0], "timestep": args[1], "text": kwargs["encoder_hidden_states"]})

    handle = pipe.unet.register_forward_pre_hook(hear, with_kwargs=True)
    for shard in sampling.shards():
        seeds = [torch.Generator().manual_seed(i) for i in shard]
        pipe([sampling.prompts[i] for i in shard], generator=seeds, output_type="latent", **sampling.options())
    handle.remove()
    return heard


def test_each_sample_is_one_the_pipeline_gave_its_denoiser(pipe, tmp_path):
    recording = Recording(record(pipe, pipe.unet, SAMPLING, tmp_path))
    heard = calls_of(pipe)
    # 2 calls of the pipeline, 2 steps, 2 prompts, with text and without
    assert len(heard) == 4 and recording.count == 16
    drawn = recording.draw(64, torch.Generator().manual_seed(0))
    assert drawn["sample"].shape == (64, 4, 8, 8) and drawn["timestep"].shape == (64,)
    found = set()
    for sample, time, text in zip(drawn["sample"], drawn["timestep"], drawn["encoder_hidden_states"], strict=True):
        places = [
            (i, j)
            for i, call in enumerate(heard)
            for j in range(4)
            if torch.equal(call["sample"][j], sample) and torch.equal(call["text"][j], text)
        ]
        assert len(places) == 1 and heard[places[0][0]]["timestep"] == time
        found.update(places)
    assert len(found) > 12  # 64 draws of 16
    with torch.no_grad():
        assert pipe.unet(**drawn)[0].shape == (64, 4, 8, 8)


def test_equal_rows_are_kept_once(pipe, tmp_path):
    files = record(pipe, pipe.unet, SAMPLING, tmp_path)
    (group,) = Recording(files[:1]).groups
    rows = {leaf.split("|")[0]: len(stack) for leaf, stack in group.tensors.items()}
    # 8 samples: 2 pictures at 2 times, with text and without; 2 prompts and the empty one
    assert group.count == 8 and rows == {"sample": 4, "timestep": 2, "encoder_hidden_states": 3}


def test_a_draw_depends_on_its_generator_alone(pipe, tmp_path):
    recording = Recording(record(pipe, pipe.unet, SAMPLING, tmp_path))
    one, same, other = (recording.draw(4, torch.Generator().manual_seed(s))["sample"] for s in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_a_recording_that_was_cut_off_goes_on(pipe, tmp_path):
    whole = record(pipe, pipe.unet, SAMPLING, tmp_path / "whole")
    files = record(pipe, pipe.unet, SAMPLING, tmp_path / "cut")
    files[1].unlink()
    files[1].with_name("00001.safetensors.9.part").write_bytes(b"half of it")
    first = files[0].stat().st_mtime_ns
    record(pipe, pipe.unet, SAMPLING, tmp_path / "cut")
    assert files[0].stat().st_mtime_ns == first
    assert content(files[1]) == content(whole[1])


def content(path):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        calls = json.loads(file.metadata()["calls"])
        return calls, {key: file.get_tensor(key).tolist() for key in file.keys()}


def test_processes_share_the_work(pipe, tmp_path):
    for rank in (0, 1):
        record(pipe, pipe.unet, SAMPLING, tmp_path, rank=rank, ranks=2)
        assert len(list(tmp_path.iterdir())) == rank + 1


def test_another_model_prompt_seed_or_size_has_another_address(pipe):
    here = fingerprint(pipe)
    assert fingerprint(tiny.pipeline()) == here
    with torch.no_grad():
        pipe.text_encoder.get_input_embeddings().weight[5, 5] += 1e-6
    other_text = fingerprint(pipe)
    other_unet = fingerprint(tiny.pipeline(seed=1))
    pipe = tiny.pipeline()
    pipe.scheduler.register_to_config(timestep_spacing="leading")
    assert len({here, other_text, other_unet, fingerprint(pipe)}) == 4

    changes = [{}, {"seed": 1}, {"height": 24}, {"steps": 3}, {"guidance": 1.0}, {"trajectories": 3}]
    addresses = {address(here, Sampling(tiny.PROMPTS, **tiny.SAMPLING | change)) for change in changes}
    addresses |= {address(here, Sampling(tiny.PROMPTS[:3], **tiny.SAMPLING)), address(other_unet, SAMPLING)}
    assert len(addresses) == 8


def test_samples_of_other_shapes_are_not_mixed(pipe, tmp_path):
    wide = Sampling(tiny.PROMPTS[:2], **tiny.SAMPLING | dict(width=32))
    files = record(pipe, pipe.unet, SAMPLING, tmp_path / "a") + record(pipe, pipe.unet, wide, tmp_path / "b")
    recording = Recording(files)
    assert [group.count for group in recording.groups] == [16, 8]
    shapes = {tuple(recording.draw(2, torch.Generator().manual_seed(i))["sample"].shape) for i in range(20)}
    assert shapes == {(2, 4, 8, 8), (2, 4, 8, 16)}


class Transformer(torch.nn.Module):
    """Called as Flux's is: by keyword, with positions that all samples share and a time for each."""

    def forward(self, hidden_states, timestep=None, img_ids=None, joint_attention_kwargs=None, return_dict=True):
        return (hidden_states,)


class Pipeline:
    def __init__(self, extra=None):
        self.transformer, self.extra = Transformer(), extra

    def __call__(self, prompts, generator, output_type, num_inference_steps):
        for step in range(num_inference_steps):
            x = torch.stack([torch.randn(2, 3, generator=g) for g in generator])
            self.transformer(
                hidden_states=x,
                timestep=torch.full((len(x),), float(step)),
                img_ids=torch.arange(2.0)[:, None].expand(2, 3),
                joint_attention_kwargs={"scale": 1.0, "extra": self.extra},
                return_dict=False,
            )


def test_shared_tensors_and_constants_come_back_as_they_were(tmp_path):
    pipe = Pipeline(extra=[torch.tensor([[1.0], [2.0]]), None])
    sampling = Sampling(("a", "b"), steps=3)
    drawn = Recording(record(pipe, pipe.transformer, sampling, tmp_path)).draw(5, torch.Generator().manual_seed(0))
    assert drawn["hidden_states"].shape == (5, 2, 3) and drawn["timestep"].shape == (5,)
    assert drawn["img_ids"].shape == (2, 3)  # though its first dimension is as long as the batch
    assert drawn["return_dict"] is False and drawn["joint_attention_kwargs"]["scale"] == 1.0
    assert drawn["joint_attention_kwargs"]["extra"][0].shape == (5, 1)
    assert drawn["joint_attention_kwargs"]["extra"][1] is None


def test_what_cannot_be_recorded_is_named(tmp_path):
    pipe = Pipeline(extra=object())
    with pytest.raises(TrajectoryError, match=r"joint_attention_kwargs\.extra of type object"):
        record(pipe, pipe.transformer, Sampling(("a",), steps=1), tmp_path)
    with pytest.raises(TrajectoryError, match="without calling its Linear"):
        record(Pipeline(), torch.nn.Linear(1, 1), Sampling(("a",), steps=1), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_damaged_file_is_named(pipe, tmp_path):
    files = record(pipe, pipe.unet, SAMPLING, tmp_path)
    files[0].write_bytes(files[0].read_bytes()[:100])
    with pytest.raises(TrajectoryError, match=r"00000\.safetensors.*remove it"):
        Recording(files)


def test_a_file_says_what_it_holds(pipe, tmp_path):
    files = record(pipe, pipe.unet, SAMPLING, tmp_path)
    calls, _ = content(files[0])
    assert Recording(files).seconds > 0
    assert len(calls) == 2 and calls[0]["sample"]["rows"] == [0, 1, 0, 1]
