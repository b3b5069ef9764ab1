"""What differs between versions of diffusers."""

from typing import Any

import torch


def in_dtype(dtype: torch.dtype) -> dict[str, Any]:
    """The keyword of `DiffusionPipeline.from_pretrained` for a dtype: `torch_dtype` until diffusers 0.42.

    Older ones take the new name for one of the pipeline's own and load float32.
    """
    import diffusers
    from packaging.version import Version

    return {"dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype": dtype}
