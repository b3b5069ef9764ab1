"""Processors to hand to `unet.set_attn_processor(...)`, as diffusers does it."""

from diffattn.cores import GroupedQueryAttention, LinearAttention, SoftmaxAttention
from diffattn.cores.linear import FIXED_MAPS
from diffattn.processors.plain import PlainAttnProcessor


class SelfAttnProcessor(PlainAttnProcessor):
    """Self-attention gets the core; cross-attention stays softmax attention."""

    replaces = ()

    def __init__(self, core):
        super().__init__(core)
        self.cross_core = SoftmaxAttention()

    def core_for(self, context):
        return self.core if context is None else self.cross_core


class LinearAttnProcessor(SelfAttnProcessor):
    """Linear self-attention on a UNet: `unet.set_attn_processor(LinearAttnProcessor("elu1"))`.

    It has no weights, so one instance may serve all layers. The arguments are those of `LinearAttention`
    with a feature map by name; a learned map needs its own copy per layer, which `diffattn.patch` makes.

    Raises: TypeError for a feature map that is not a name, ValueError for the name of a learned one.
    """

    def __init__(self, feature_map: str = "relu", *, normalizer: str = "sum", eps: float = 1e-15):
        if not isinstance(feature_map, str):
            raise TypeError(
                f"feature_map: got {type(feature_map).__name__}, expected a name: set_attn_processor shares one "
                "instance among all layers; use diffattn.patch(model, LinearAttention(module)) for a learned map"
            )
        if feature_map not in FIXED_MAPS:
            raise ValueError(
                f"feature_map: got {feature_map!r}, expected one of {', '.join(FIXED_MAPS)}: set_attn_processor "
                "shares one instance among all layers; a learned map has weights for each, which diffattn.patch makes"
            )
        super().__init__(LinearAttention(feature_map, normalizer=normalizer, eps=eps))


class MQAAttnProcessor(SelfAttnProcessor):
    """Multi-query self-attention on a UNet: keys and values of all heads pooled to `kv_heads` heads."""

    def __init__(self, kv_heads: int = 1):
        super().__init__(GroupedQueryAttention(kv_heads=kv_heads))
