"""Whether a layer's projections still are what an attention core took over: it would not notice by itself."""

import math
import time
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from diffattn.cores import AttentionCore
from diffattn.cores.base import samples
from diffattn.kernels import exporting
from diffattn.processors.projections import modules_of

#: Seconds between two looks at a layer while steps follow each other. Each waits for the GPU, and SDXL has 70 layers.
LOOK_EVERY = 10.0
#: Seconds without a call after which there may have been a change, so that the next call looks: the first, if it is
#: twice as long as from step to step, or the second.
PAUSE, LONG_PAUSE = 0.25, 2.0
#: Relative change of a weight above the rounding of bfloat16, which casting a model back and forth leaves.
CHANGED = 2**-8


def refuse_changed_weights(core: AttentionCore, attn: nn.Module, names: Mapping[str, str]) -> None:
    """Raise if a layer's weight is not the one that the core took over: that change would have no effect.

    A LoRA that was fused and unloaded leaves no other trace: the weight has the same address and version. One that is
    loaded acts, so its projection is left out.

    Args:
        core: one with projections of its own.
        names: role -> attribute of the layer.
    """
    if torch.compiler.is_compiling() or exporting():
        return
    now, times = time.monotonic(), vars(core.projections)  # nn.Module's own setattr takes microseconds
    gap = now - times.get("called", -math.inf)
    paused = gap > min(LONG_PAUSE, max(PAUSE, 2 * times.get("step", 0.0)))
    times["called"], times["step"] = now, gap if gap < math.inf else 0.0
    unloaded, plain_before = False, times.pop("plain", None)
    if times.pop("adapted", False):  # the last call called adapters
        # No pause is needed to fuse and unload them: what they were on is looked at once they are gone.
        modules = modules_of(attn, _replaced(core, names))
        times["plain"] = {role for role, (_, module) in modules.items() if not hasattr(module, "base_layer")}
        unloaded = times["plain"] != plain_before
    if not (paused or unloaded) and now - times.get("looked", -math.inf) < LOOK_EVERY:
        return
    weights, befores = {}, {}
    for role, (_, module) in modules_of(attn, _replaced(core, names)).items():
        weight, before = _weight_to_compare(module), getattr(core.projections[role], "instead_of", None)
        if weight is not None and before is not None:
            weights[role], befores[role] = weight, before
    if any(weight.is_cuda for weight in weights.values()) and torch.cuda.is_current_stream_capturing():
        return
    for role, found in zip(weights, samples(list(weights.values())), strict=True):
        if torch.dist(found, befores[role]) > CHANGED * befores[role].norm():
            times.pop("looked", None)  # the next call raises too
            raise RuntimeError(
                f"projection {role!r}: the layer's weight has changed since the attention core took it over, by a "
                "LoRA that was fused and unloaded or by other weights loaded into the model; that has no effect on "
                "the core's own. Keep the LoRA loaded, fused or not, and it acts; or call diffattn.unpatch(...), "
                "load, and diffattn.patch(...) again"
            )
    times["looked"] = now


def _replaced(core: AttentionCore, names: Mapping[str, str]) -> dict[str, str]:
    return {role: name for role, name in names.items() if role in core.projections}


def _weight_to_compare(module: nn.Module) -> Tensor | None:
    weight = None if hasattr(module, "base_layer") else getattr(module, "weight", None)  # none of a dropped one
    # float8 storage rounds more than a LoRA adds
    return None if weight is None or weight.is_meta or weight.element_size() < 2 else weight
