"""Distilling: a pipeline's own softmax attention teaches the attention that replaces it.

from diffattn.distill import distill
distill("folder-or-hub-id", "linear", prompts, "out")       # then: diffattn.patch(pipe, weights="out")
"""

from diffattn.distill.card import push
from diffattn.distill.run import Result, distill
from diffattn.distill.settings import DistillError, Settings, read_prompts
from diffattn.distill.trajectories import Recording, Sampling, TrajectoryError

__all__ = [
    "DistillError",
    "Recording",
    "Result",
    "Sampling",
    "Settings",
    "TrajectoryError",
    "distill",
    "push",
    "read_prompts",
]
