"""Context parallelism that a processor refused: what diffusers had set by then, and how it is taken back."""

from collections.abc import Iterable

from torch import nn

from diffattn.processors import CoreAttnProcessor


def take_back_refused(models: Iterable[nn.Module]) -> None:
    """Undo the part of `enable_parallelism()` that was done when a processor refused it.

    It records its settings on the model, then on one processor after the other, and stops at the one that cannot: the
    model would take no second call, and those before it would exchange tokens that nobody has split.
    """
    for model in models:
        processors = [p for module in model.modules() if (p := getattr(module, "processor", None)) is not None]
        for refused in [p for p in processors if isinstance(p, CoreAttnProcessor) and p.refused is not None]:
            for holder in (model, *processors):
                if getattr(holder, "_parallel_config", None) is refused.refused:
                    holder._parallel_config = None
            refused.refused = None
