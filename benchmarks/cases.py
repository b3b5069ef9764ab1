"""The shapes that the benchmarks run, each as a real model has it at a real size. Batch 2 is guidance's pair."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Linear:
    """Non-causal linear attention, every tensor (B, N, H, D).

    Attributes:
        every_peer: whether the slowest to start, compiled copies of other projects' formulas, run too.
        train: forward and backward as well.
        channel_first: the model has q, k, v in one tensor (B, H, 3 D, N), as DC-AE's convolutions leave them.
        graph: small enough that its launches show, so it is also replayed from a CUDA graph.
        rotary: the model rotates the numerator.
    """

    name: str
    B: int
    N: int
    H: int
    D: int
    every_peer: bool = False
    train: bool = False
    channel_first: bool = False
    graph: bool = False
    rotary: bool = False

    @property
    def elements(self) -> int:
        """Of one tensor. The forward reads three and writes one; with the backward, eleven go past (`passes`)."""
        return self.B * self.N * self.H * self.D


@dataclass(frozen=True)
class Softmax:
    """Softmax attention whose query heads share key/value heads: q (B, N, H, D), k and v (B, M, Hkv, D)."""

    name: str
    B: int
    N: int
    H: int
    Hkv: int
    D: int
    keys: int | None = None  # M, if another number than N

    @property
    def M(self) -> int:
        return self.N if self.keys is None else self.keys

    @property
    def flops(self) -> int:
        """Of the two products, Q K^T and P V."""
        return 4 * self.B * self.H * self.N * self.M * self.D


@dataclass(frozen=True)
class NormRope:
    """RMS norm of q (B, N, H, D) and k (B, N, Hkv, D), then rotary embedding.

    Attributes:
        norm: over each head, `"across"` all heads of a token, or None.
        rotary: `"complex"` (Lumina 2), `"interleaved"` (Flux), `"half"` (Stable Audio) or None.
        rotated: how many features of a head are rotated; None is all.
    """

    name: str
    B: int
    N: int
    H: int
    Hkv: int
    D: int
    norm: str | None = "head"
    rotary: str | None = None
    rotated: int | None = None

    @property
    def elements(self) -> int:
        """Of q and k together: each is read once and written once."""
        return self.B * self.N * (self.H + self.Hkv) * self.D


@dataclass(frozen=True)
class Causal:
    """Causal linear attention, q, k, v (B, N, H, D).

    Attributes:
        decay: `"head"`, a constant a head as retention's; `"token"`, one a token and head; `"channel"`, one a token
            and channel; or None.
        normalize: relu on q and k, and a denominator.
        train: forward and backward as well.
    """

    name: str
    B: int
    N: int
    H: int
    D: int
    decay: str | None = None
    normalize: bool = False
    train: bool = False

    @property
    def elements(self) -> int:
        """Of q, k, v or the output."""
        return self.B * self.N * self.H * self.D

    @property
    def decays(self) -> int:
        return {None: 0, "head": self.H, "token": self.elements // self.D, "channel": self.elements}[self.decay]


LINEAR = [
    Linear("Sana 1024px", 2, 1024, 70, 32, every_peer=True, train=True, graph=True),
    Linear("Sana 4096px", 2, 16384, 70, 32, every_peer=True, train=True),
    Linear("DC-AE 4096px", 1, 262144, 32, 32, every_peer=True, train=True, channel_first=True),
    Linear("SDXL 4096px", 2, 65536, 10, 64, every_peer=True, train=True),
    Linear("SD 1.5 2048px", 2, 65536, 8, 40, every_peer=True, train=True),
    Linear("SANA-Video", 2, 32760, 20, 112, every_peer=True, train=True, rotary=True),
    Linear("Flux 4096px", 1, 66048, 24, 128, every_peer=True, train=True),
    # The decoder's three stages with attention; batch 1, as pipelines decode.
    Linear("DC-AE 1024px, stage 4", 1, 16384, 32, 32, channel_first=True, graph=True),
    Linear("DC-AE 1024px, stage 5", 1, 4096, 64, 32, channel_first=True, graph=True),
    Linear("DC-AE 1024px, stage 6", 1, 1024, 64, 32, channel_first=True, graph=True),
    Linear("SDXL 1024px, 64 x 64", 2, 4096, 10, 64, graph=True),
    Linear("SDXL 1024px, 32 x 32", 2, 1024, 20, 64, graph=True),
    Linear("PixArt 1024px", 2, 4096, 16, 72, graph=True),
    Linear("PixArt-Sigma 2048px", 2, 16384, 16, 72),
    Linear("SD 1.5 2048px, 128 x 128", 2, 16384, 8, 80),
    Linear("SD 1.5 2048px, 64 x 64", 2, 4096, 8, 160, graph=True),
    Linear("Lumina 2 2048px", 2, 16640, 24, 96),
    Linear("Stable Audio", 2, 1025, 24, 64, graph=True),
    # Between the sizes above, so that time can be drawn against tokens.
    Linear("Sana 2048px", 2, 4096, 70, 32),
    Linear("SDXL 2048px", 2, 16384, 10, 64),
    Linear("Flux 1024px", 1, 4608, 24, 128),
    Linear("Flux 2048px", 1, 16896, 24, 128),
]

SOFTMAX = [
    Softmax("Lumina 2 1024px", 2, 4352, 24, 8, 96),
    Softmax("DreamLite 1024px, 64 x 64", 2, 4096, 10, 1, 64),
    Softmax("DreamLite 1024px, 32 x 32", 2, 1024, 20, 1, 64),
    Softmax("32760 tokens, one kv head", 1, 32760, 12, 1, 128),
    Softmax("16384 tokens, one kv head", 1, 16384, 32, 1, 128),
    Softmax("16384 tokens, 8 kv heads", 1, 16384, 32, 8, 64),
    Softmax("Stable Audio, to the text", 2, 1025, 24, 12, 64, keys=130),
]

NORM_ROPE = [
    NormRope("Lumina 2 1024px", 2, 4352, 24, 8, 96, rotary="complex"),
    NormRope("Flux 1024px", 1, 4608, 24, 24, 128, rotary="interleaved"),
    NormRope("32760 tokens, norm across heads", 1, 32760, 12, 12, 128, norm="across", rotary="interleaved"),
    NormRope("SANA-Video, norm alone", 2, 32760, 20, 20, 112, norm="across"),
    NormRope("Stable Audio", 2, 1025, 24, 24, 64, norm=None, rotary="half", rotated=32),
]


def causal(name: str, *shape: int, train: bool = False, channel: bool = False) -> list[Causal]:
    """A shape with each kind of decay."""
    return [
        Causal(f"{name}, no decay", *shape, train=train),
        Causal(f"{name}, normalized", *shape, normalize=True, train=train),
        Causal(f"{name}, retention", *shape, "head", train=train),
        Causal(f"{name}, decay a token", *shape, "token", train=train),
    ] + channel * [Causal(f"{name}, decay a channel", *shape, "channel", train=train and shape[1] < 65536)]


CAUSAL = [
    *causal("SDXL 4096px", 2, 65536, 10, 64, train=True, channel=True),
    *causal("SDXL 4096px, 128 x 128, batch 8", 8, 16384, 20, 64),
    # sequence models
    *causal("4096 tokens", 8, 4096, 16, 128, train=True, channel=True),
    *causal("2048 tokens", 4, 2048, 32, 64),
]

# A token of 16 sequences, at each of 64 layers.
CAUSAL_STEP = [
    Causal("64 layers, retention", 16, 1, 16, 64, "head"),
    Causal("64 layers, decay a token", 16, 1, 16, 64, "token"),
]
