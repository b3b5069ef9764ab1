"""Attention of diffusers that no processor here replaces, and why: what `patch` says of such layers."""

SPARSE = "its attention is sparse, a FlexAttention mask over blocks of tokens"
IMAGE_PROMPTS = "it attends to image prompts too, by weights of its own: unload the IP-Adapter to patch this layer"
PERTURBED = "it perturbs attention for guidance"
PERTURBED_BY_GUIDANCE = "guidance perturbs or skips this layer's attention, and knows stock's processors alone"
SET_BY_HAND = (
    "diffattn's own, not set by patch: set one of diffusers' in its place, set_attn_processor(AttnProcessor2_0())"
)
KEY_CACHE = "its keys and values go through a cache that only this processor knows"

#: Stock processor class name -> why it stays.
BY_REASON = {
    "AnyFlowCausalAttnProcessor": f"{KEY_CACHE}, and {SPARSE}",
    "Kandinsky6SRAttnProcessor": SPARSE,
    "LTX2VideoVaeNeighborhoodAttnProcessor": SPARSE,
    "LTX2VideoVaeNeighborhoodNattenProcessor": "its attention is sparse, by NATTEN's kernels",
    "QwenImage21FlexAttnProcessor": SPARSE,
    "SanaWMLTX2RefinerAttnProcessor": KEY_CACHE,
    "WanAnimate2AttnProcessor": f"{KEY_CACHE}, and {SPARSE}",
    "FluxIPAdapterAttnProcessor": IMAGE_PROMPTS,
    "IPAdapterAttnProcessor": IMAGE_PROMPTS,
    "IPAdapterAttnProcessor2_0": IMAGE_PROMPTS,
    "SD3IPAdapterJointAttnProcessor2_0": IMAGE_PROMPTS,
    "PAGCFGIdentitySelfAttnProcessor2_0": PERTURBED,
    "PAGIdentitySelfAttnProcessor2_0": PERTURBED,
    "SlicedAttnProcessor": "it computes attention in slices: call disable_attention_slicing() to patch this layer",
    "XFormersAttnProcessor": (
        "it calls xformers: call disable_xformers_memory_efficient_attention() to patch this layer"
    ),
    "Flux2KVAttnProcessor": KEY_CACHE,
    "Flux2KVParallelSelfAttnProcessor": KEY_CACHE,
}

#: Model class name -> why a converted core is not chosen for its plain self-attention.
NOT_CONVERTED = {
    "PriorTransformer": "attends causally, to text too",
    "T5FilmDecoder": "masks pairs of tokens",
}

_IN_FORWARD = "attends inside its own forward: diffusers gives it no processor to replace"

#: Class name of a module that attends without a processor -> why it stays. Each attends by itself: nothing below it
#: is listed again.
WITHOUT_PROCESSOR = {
    name: _IN_FORWARD
    for name in (
        "HunyuanImageAttentionBlock",
        "HunyuanImageRefinerAttnBlock",
        "HunyuanVideo15AttnBlock",
        "LTX2AudioAttnBlock",
        "MultiheadAttention",
        "QwenImage21AttentionBlock",
        "QwenImageAttentionBlock",
        "SelfAttention1d",
        "VidTokAttnBlock",
        "WanAttentionBlock",
    )
} | {
    name: f"(softmax, beside a gated delta rule) {_IN_FORWARD}"
    for name in ("SanaWMSoftmaxAttention", "SanaWMSoftmaxCamAttention")
}
