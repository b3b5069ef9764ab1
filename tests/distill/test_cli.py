"""`diffattn distill`, in this process and in two at once."""

import json
import os
import subprocess
import sys

import pytest
import torch

import diffattn
from diffattn import cli
from tests.distill import tiny

SIZES = ["--sampling-steps", "2", "--guidance", "2", "--size", "16", "--sampling-batch", "2", "--batch", "2"]
SIZES += ["--mixed-precision", "no"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a model, prompts and a cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIFFATTN_CACHE", str(tmp_path / "cache"))
    tiny.pipeline().save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("\n".join(tiny.PROMPTS) + "\n")
    return tmp_path


def arguments(**changes):
    chosen = dict(model="model", core="linear", prompts="prompts.txt", out="out") | changes
    return [part for name, value in chosen.items() for part in (f"--{name.replace('_', '-')}", *str(value).split())]


def run(monkeypatch, *parts):
    monkeypatch.setattr(sys, "argv", ["diffattn", "distill", *parts])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code


def test_a_command_makes_weights_that_patch_loads(here, monkeypatch, capsys):
    assert run(monkeypatch, *arguments(steps="2 2"), *SIZES) in (0, None)
    out = capsys.readouterr().out
    assert "16 samples of 4 trajectories" in out and "Wrote out: diffattn.patch(pipe, weights='out')" in out
    pipe = tiny.pipeline()
    handle = diffattn.patch(pipe, weights="out")
    assert len(handle.installed) == 4 and str(handle).count("LinearAttention") == 4
    assert json.loads((here / "out" / "summary.json").read_text())["settings"]["train"] == "projections"


def test_minutes_end_a_command_and_the_same_again_goes_on(here, monkeypatch, capsys):
    assert run(monkeypatch, *arguments(steps="3 3", minutes="0.00001"), *SIZES) in (0, None)
    assert "The time is over after step 1; the same command goes on" in capsys.readouterr().out
    assert run(monkeypatch, *arguments(steps="3 3"), *SIZES) in (0, None)
    assert "goes on from step 1 of 6" in capsys.readouterr().out
    assert (here / "out" / "README.md").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(model="nowhere"), "model: nowhere is no folder or hub id of a pipeline"),
        (dict(prompts="none.txt"), "prompts: there is no file none.txt"),
        (dict(prompts="empty.txt"), "prompts: empty.txt has none"),
        (dict(core="lienar"), "core: got 'lienar', expected one of linear"),
        (dict(out="other"), "out: other is not empty (thesis.txt"),
        (dict(train="core"), "has no weights of its own"),
        (dict(batch="0"), "batch: got 0"),
        (dict(steps="0 0"), "steps: got (0, 0)"),
        (dict(train="everything"), "'everything'"),
    ],
)
def test_what_is_wrong_gets_one_line_before_anything_is_drawn(here, monkeypatch, capsys, changes, message):
    (here / "empty.txt").write_text("\n\n")
    (here / "other").mkdir()
    (here / "other" / "thesis.txt").write_text("x")
    assert run(monkeypatch, *arguments(**changes)) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("diffattn: ") == 1
    assert not (here / "cache").exists() and not (here / "out").exists()


def test_a_run_that_fails_says_so_in_one_line(here, monkeypatch, capsys):
    assert run(monkeypatch, *arguments(steps="20 1", learning_rate="1e30 1e30"), *SIZES) == 1
    captured = capsys.readouterr()
    assert "not finite" in captured.err or "the loss is" in captured.err


@pytest.mark.slow
def test_two_processes_train_as_one_with_twice_the_batches(here, monkeypatch):
    assert run(monkeypatch, *arguments(steps="3 2", out="one", accumulate="2"), *SIZES) in (0, None)
    # What `accelerate launch` runs on several GPUs; on CPUs it wants MPI.
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command = [*launch, "-m", "tests.distill.launched", "distill", *arguments(steps="3 2", out="two"), *SIZES]
    root = str(tiny.EMOJI.parents[2])
    env = os.environ | {"PYTHONPATH": root, "DIFFATTN_CACHE": str(here / "cache-of-two")}
    env["ACCELERATE_USE_CPU"] = "1"
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=here, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((here / "cache-of-two").rglob("*.safetensors"))) == 2  # drawn by one process each
    one, two = (torch.load(here / name / "run" / "checkpoint.pt", weights_only=True) for name in ("one", "two"))
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    for name, parameter in one["parameters"].items():
        torch.testing.assert_close(two["parameters"][name], parameter, rtol=1e-3, atol=1e-4)
    assert json.loads((here / "two" / "summary.json").read_text())["processes"] == 2
