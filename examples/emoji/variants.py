"""The attention that the emoji pipeline is converted to, and how long each is distilled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from diffattn import AttentionCore, GroupedQueryAttention, LinearAttention, SparseLinearAttention, WindowAttention


@dataclass(frozen=True)
class Variant:
    """A core and its training.

    Attributes:
        core: makes it.
        steps: of stage 1 and stage 2.
        learning_rate: of each.
    """

    core: Callable[[], AttentionCore]
    steps: tuple[int, int]
    learning_rate: tuple[float, float] = (2e-3, 1e-3)


LINEAR_STEPS = (800, 3200)
QUARTER = tuple(steps // 4 for steps in LINEAR_STEPS)

VARIANTS: dict[str, Variant] = {
    "mqa": Variant(lambda: GroupedQueryAttention(kv_heads=1, pooling="svd"), (400, 1200)),
    "linear": Variant(lambda: LinearAttention("hedgehog", input_map="mlp"), LINEAR_STEPS),
    "sparse": Variant(SparseLinearAttention, QUARTER),
    "window": Variant(WindowAttention, QUARTER),
}
