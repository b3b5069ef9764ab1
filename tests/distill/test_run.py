"""A run from prompts to a result; what it refuses; what survives."""

import json
import multiprocessing
import os
import signal

import pytest
import torch
from PIL import Image

import diffattn
from diffattn.distill import DistillError, Recording, loop, read_prompts
from tests.distill import tiny
from tests.models.base import Rand
from tests.models.unets import unet_inputs


def predict(pipe):
    with torch.no_grad():
        return pipe.unet(**unet_inputs(Rand(torch.Generator().manual_seed(3)))).sample


def test_the_result_is_a_folder_that_patch_loads(run, tmp_path):
    result = run(core="mqa")
    assert result.finished and result.step == 8 == len(result.losses)
    names = {"README.md", "diffattn.json", "diffattn.safetensors", "summary.json", "grid.png", "run"}
    assert names <= {p.name for p in result.folder.iterdir()}
    stock = predict(tiny.pipeline())
    for core in (None, "mqa"):
        other = tiny.pipeline()
        diffattn.patch(other, core, weights=str(result.folder))
        assert torch.equal(predict(other), predict(result.pipe))
    result.handle.undo()
    assert torch.equal(predict(result.pipe), stock)


@pytest.mark.parametrize(
    "layers, taken", [("*attn1", 4), (["mid*attn1", "*attn2"], 5), (lambda name, attn: name.endswith("attn1"), 4)]
)
def test_layers_as_patch_takes_them(run, layers, taken):
    assert len(run(core="hedgehog", layers=layers, steps=(1, 0)).handle.installed) == taken
    with pytest.raises(ValueError, match=r"holds another run \(layers: "):
        run(core="hedgehog", layers="down*attn1", steps=(1, 0))


@pytest.mark.parametrize("train", ["projections", "lora"])
def test_projections_that_were_trained_are_saved_and_loaded(run, train):
    result = run(core="linfusion", train=train, rank=2)
    other = tiny.pipeline()
    diffattn.patch(other, weights=str(result.folder))
    assert torch.equal(predict(other), predict(result.pipe))


def test_training_falls_and_leaves_the_teacher_alone(run):
    pipe = tiny.pipeline()
    before = {name: t.clone() for name, t in pipe.unet.state_dict().items()}
    result = run(model=pipe, core="linear", train="projections", steps=(40, 1), batch=8)
    assert sum(result.losses[35:40]) < 0.9 * sum(result.losses[:5])
    result.handle.undo()
    after = pipe.unet.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(t, after[name]) for name, t in before.items())
    assert all(p.requires_grad for p in pipe.unet.parameters())


@pytest.mark.parametrize("train", ["core", "projections", "lora"])
def test_only_what_was_asked_for_is_trained(run, train):
    result = run(core=diffattn.LinearAttention(tiny.LearnedMap()), train=train, steps=(2, 2), rank=2)
    changed = set()
    for name, layer in result.handle._layers.items():
        core = result.handle.installed[name].core
        assert not any(p.requires_grad for p in core.parameters())
        assert not any("lora" in key for key in core.state_dict())
        for role, module in (core.projections or {}).items():
            stock = layer.attn.to_out[0] if role == "out" else getattr(layer.attn, f"to_{role}")
            assert not torch.equal(module.weight, stock.weight)
            difference = torch.linalg.matrix_rank(module.weight - stock.weight, rtol=1e-3)
            assert difference <= 2 or train != "lora"
            changed.add(role)
    assert changed == (set() if train == "core" else {"q", "k", "v", "out"})


def test_the_same_call_again_goes_on_to_the_same_losses(run, monkeypatch):
    whole = run("whole")
    step = loop.Trainer._train_step
    for cut in (1, 3, 4, 6):  # between checkpoints, at the end of stage 1, in stage 2

        def stop_after(trainer, cut=cut):
            if trainer.step == cut:
                raise KeyboardInterrupt
            step(trainer)

        monkeypatch.setattr(loop.Trainer, "_train_step", stop_after)
        with pytest.raises(KeyboardInterrupt):
            run(f"cut-{cut}")
        monkeypatch.setattr(loop.Trainer, "_train_step", step)
        result = run(f"cut-{cut}")
        assert result.losses == whole.losses
        assert all(
            torch.equal(a, b) for a, b in zip(result.pipe.unet.parameters(), whole.pipe.unet.parameters(), strict=True)
        )


def _killed(run, at_rename: bool):
    """Run in a child that dies without a goodbye: in step 5, or between a checkpoint's writing and its renaming."""

    def child():
        if at_rename:
            replace = loop.Path.replace

            def dies(path, target):
                if path.name == "checkpoint.pt.part" and os.path.exists(target):
                    os.kill(os.getpid(), signal.SIGKILL)
                return replace(path, target)

            loop.Path.replace = dies
        else:
            step = loop.Trainer._train_step
            loop.Trainer._train_step = lambda t: os.kill(os.getpid(), signal.SIGKILL) if t.step == 5 else step(t)
        run("killed")

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("at_rename", [False, True])
def test_a_killed_run_goes_on_to_the_same_losses(run, tmp_path, at_rename):
    whole = run("whole")
    _killed(run, at_rename)
    state = torch.load(tmp_path / "killed" / "run" / "checkpoint.pt", weights_only=True)
    assert state["step"] == (2 if at_rename else 4)
    assert run("killed").losses == whole.losses


def test_a_finished_run_is_not_trained_again(run, monkeypatch):
    first = run()
    monkeypatch.setattr(loop.Trainer, "_train_step", lambda trainer: pytest.fail("trains"))
    for name in ("README.md", "grid.png", "run/grid-000008.png"):  # killed before it drew the last preview
        (first.folder / name).unlink()
    again = run()
    assert again.finished and again.losses == first.losses
    assert (first.folder / "README.md").exists() and (first.folder / "grid.png").exists()
    assert torch.equal(predict(again.pipe), predict(first.pipe))


def test_minutes_stop_with_a_checkpoint(run, tmp_path):
    first = run(minutes=1e-6)
    assert not first.finished and 0 < first.step < 8
    assert not (tmp_path / "out" / "README.md").exists()
    result = run(minutes=10)
    assert result.finished and result.losses == run("whole").losses


def test_nan_stops_with_the_last_good_checkpoint(run, tmp_path, monkeypatch):
    step = loop.Trainer._train_step

    def poison(trainer):
        if trainer.step == 5:
            with torch.no_grad():
                list(trainer.parameters.values())[1].fill_(float("nan"))
        step(trainer)

    monkeypatch.setattr(loop.Trainer, "_train_step", poison)
    pipe = tiny.pipeline()
    stock = dict(pipe.unet.attn_processors)
    with pytest.raises(
        DistillError, match=r"loss is nan at step 5, first in layer unet\..*holds step 4, which is sound"
    ):
        run(model=pipe)
    assert dict(pipe.unet.attn_processors) == stock
    state = torch.load(tmp_path / "out" / "run" / "checkpoint.pt", weights_only=True)
    assert state["step"] == 4 and all(p.isfinite().all() for p in state["parameters"].values())
    monkeypatch.setattr(loop.Trainer, "_train_step", step)
    assert run().losses == run("whole").losses


def test_batches_of_one_step_add_up_to_their_mean_gradient(run, monkeypatch):
    draw = Recording.draw
    monkeypatch.setattr(Recording, "draw", lambda self, size, _: draw(self, size, torch.Generator().manual_seed(0)))
    assert run("two", accumulate=2).losses == run("one").losses


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(core="softmax2"), "core: got 'softmax2'"),
        (dict(core=None), "core: got None"),
        (dict(model="no/such/folder"), "model: no/such/folder is no folder or hub id"),
        (dict(model=torch.nn.Linear(1, 1)), "model: got Linear"),
        (dict(prompts=[]), "prompts: the list has none"),
        (dict(prompts=["a", " "]), "prompts: the list has none, or an empty one"),
        (dict(prompts="owl"), "prompts: got the text 'owl', expected a list"),
        (dict(steps=(0, 0)), "steps: got"),
        (dict(steps=3), "steps: got 3, expected the steps of stage 1 and 2"),
        (dict(steps=(1.5, 1)), "steps: got"),
        (dict(batch=0), "batch: got 0"),
        (dict(batch=True), "batch: got True"),
        (dict(sampling=dict(trajectories=0)), "trajectories: got 0, expected a positive integer or None"),
        (dict(sampling=dict(steps=0)), "steps: got 0, expected a positive integer, of the pictures"),
        (dict(sampling=dict(height=-8)), "height: got -8"),
        (dict(sampling=dict(batch=0)), "batch: got 0"),
        (dict(train="all"), "train: got 'all'"),
        (dict(core="linear"), "has no weights of its own"),
        (dict(learning_rate=(1e-3, -1.0)), "learning_rate: got"),
        (dict(learning_rate=1e-3), "learning_rate: got 0.001, expected two"),
        (dict(mixed_precision="int8"), "mixed_precision: got 'int8'"),
        (dict(layers="nothing*"), "matches none"),
        (dict(minutes=0), "minutes: got 0"),
        (dict(push_to="no user"), "push_to: got 'no user'"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_drawn(run, tmp_path, monkeypatch, change, message):
    from diffattn.distill import run as module

    monkeypatch.setattr(module, "record", lambda *_, **__: pytest.fail("draws"))
    if change.get("core", 0) is None:
        from diffattn.distill import distill

        with pytest.raises(TypeError, match=message):
            distill(tiny.pipeline(), None, tiny.PROMPTS, tmp_path / "out")
        return
    with pytest.raises((ValueError, TypeError), match=message):
        run(**change)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_run_is_refused(run, tmp_path):
    run(steps=(2, 1))
    for change, message in (
        (dict(steps=(2, 2)), r"settings\.steps: \[2, 1\] there, \[2, 2\] now"),
        (dict(steps=(2, 1), core="mqa"), "core: "),
        (dict(steps=(2, 1), model=tiny.pipeline(seed=1)), "model: "),
        (dict(steps=(2, 1), prompts=["another"]), "prompts: '4 with"),
    ):
        with pytest.raises(ValueError, match=rf"out: .* holds another run \({message}"):
            run(**change)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match=r"not empty \(thesis.txt"):
        run("mine")
    with pytest.raises(ValueError, match="is a file"):
        run("mine/thesis.txt")


def test_a_damaged_checkpoint_is_named(run, tmp_path):
    run()
    path = tmp_path / "out" / "run" / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DistillError, match=r"checkpoint.pt cannot be read .* remove it"):
        run()


def test_a_half_precision_model_needs_mixed_precision(run):
    with pytest.raises(ValueError, match=r"mixed_precision: got 'no' for a model in torch.bfloat16"):
        run(model=tiny.pipeline().to(torch.bfloat16))


def test_prompts_come_from_a_text_file(tmp_path):
    path = tmp_path / "prompts.txt"
    with pytest.raises(FileNotFoundError, match="prompts: there is no file"):
        read_prompts(path)
    path.write_text("\n  \n")
    with pytest.raises(ValueError, match=r"prompts: .*prompts\.txt has none"):
        read_prompts(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="no text file"):
        read_prompts(path)
    path.write_text("an owl\n\n  a café \n", encoding="utf-8")
    assert read_prompts(path) == ("an owl", "a café")


def test_grids_and_curves_come_every_so_many_steps(run, tmp_path):
    seen, stock = [], predict(tiny.pipeline())

    def look(step, pipe, teacher):
        with teacher():
            assert torch.equal(predict(pipe), stock)
        seen.append((step, predict(pipe).sum()))

    run(curve=True, preview_every=4, preview_prompts=2, on_preview=look)
    folder = tmp_path / "out" / "run"
    assert [step for step, _ in seen] == [4, 8] and seen[0][1] != seen[1][1]
    assert {p.name for p in folder.glob("*.png")} == {"grid-000004.png", "grid-000008.png", "curve.png"}
    assert Image.open(folder / "curve.png").width > 500 and Image.open(tmp_path / "out" / "grid.png").width > 500
    losses = json.loads((folder / "losses.json").read_text())
    assert len(losses["losses"]) == 8 and len(losses["by_layer"]["8"]) == len(losses["layers"]) == 4


def test_without_matplotlib_there_is_no_curve_and_a_word_about_it(run, tmp_path, monkeypatch, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run(progress=True, curve=True).finished
    assert "matplotlib is not installed" in capsys.readouterr().out
    assert not (tmp_path / "out" / "curve.png").exists()


def test_lines_tell_of_loss_and_time_where_there_is_no_terminal(run, capsys):
    run(progress=True)
    out = capsys.readouterr().out
    assert "16 samples of 4 trajectories" in out and "distill: 8/8  stage 2  loss" in out and "s to go" in out
