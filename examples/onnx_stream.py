"""A video model frame by frame in ONNX Runtime, its memory staying where it runs.

    python examples/onnx_stream.py              export a small SANA-Video, run 100 frames, compare with torch

`OnnxStream` drives any file of `to_onnx(..., streaming=True)`: states are bound as inputs and outputs, two sets of
buffers take turns, and nothing but the frames and the result is copied.
"""

import argparse
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import torch

import diffattn
from diffattn.export import to_onnx
from diffattn.export_streaming import describe


class OnnxStream:
    """Call it with the model's inputs by name, as NumPy arrays, a few frames at a time.

    Args:
        path: an exported step.
        batch: samples of a step.
        device: "cpu" or "cuda", where the states stay.
    """

    def __init__(self, path, batch: int, device: str = "cpu"):
        provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[device]
        self.session = onnxruntime.InferenceSession(str(path), providers=[provider])
        self.device, self.frames = device, 0
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.states = describe(path)
        self.buffers = [
            {s["name"]: self._zeros(s, batch) for s in self.states},
            {s["name"]: self._zeros(s, batch) for s in self.states},
        ]

    def _zeros(self, state, batch):
        shape = [batch if n == "batch" else n for n in state["shape"]]
        return onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, state["dtype"]), self.device, 0)

    def __call__(self, frames: int = 1, **inputs: np.ndarray) -> np.ndarray:
        """The output for the next `frames` frames."""
        before, after = self.buffers
        binding = self.session.io_binding()
        binding.bind_output("out", self.device)
        if "frame" in self.inputs:
            inputs["frame"] = np.array(self.frames)
        for name, x in inputs.items():
            if name in self.inputs:
                binding.bind_cpu_input(name, np.ascontiguousarray(x))
        for s in self.states:
            binding.bind_ortvalue_input(s["input"], before[s["name"]])
            binding.bind_ortvalue_output(s["output"], after[s["name"]])
        self.session.run_with_iobinding(binding)
        self.buffers = [after, before]
        self.frames += frames
        return binding.get_outputs()[0].numpy()


def small_model(layers: int) -> torch.nn.Module:
    """SANA-Video at a size for a CPU, random weights, 16 tokens a frame, patched for streaming."""
    from diffusers import SanaVideoTransformer3DModel

    torch.manual_seed(0)
    model = SanaVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=layers,
        num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=16,
        rope_max_seq_len=128,
    ).eval()  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random weights have nothing to lose
        diffattn.patch(model, diffattn.CausalLinearAttention("relu", block=16), layers="*attn1")
    return model


def main(frames: int = 100, layers: int = 2, folder: str | None = None) -> float:
    """The largest difference between the two streams, relative to the largest number."""
    model = small_model(layers)
    generator = torch.Generator().manual_seed(0)
    video = torch.randn(2, 4, frames, 8, 8, generator=generator)
    text = torch.randn(2, 7, 16, generator=generator)
    times = torch.tensor([3.0, 500.0])
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(folder or temporary) / "step.onnx"
        samples = dict(hidden_states=video[:, :, :3], encoder_hidden_states=text, timestep=times)
        to_onnx(model, path, sample_inputs=samples, streaming=True)
        onnx_stream = OnnxStream(path, batch=2)
        worst, seconds = 0.0, [0.0, 0.0]
        with torch.no_grad(), diffattn.streaming(model) as stream:
            for frame in video.split(1, 2):
                started = time.perf_counter()
                expected = stream(frame, encoder_hidden_states=text, timestep=times, return_dict=False)[0]
                between = time.perf_counter()
                out = onnx_stream(
                    hidden_states=frame.numpy(), encoder_hidden_states=text.numpy(), timestep=times.numpy()
                )
                seconds = [seconds[0] + between - started, seconds[1] + time.perf_counter() - between]
                difference = (torch.from_numpy(out) - expected).abs().max() / expected.abs().max()
                worst = max(worst, float(difference))
    a_frame = [f"{1e3 * s / frames:.2f} ms" for s in seconds]
    print(
        f"{frames} frames: torch {a_frame[0]}, ONNX Runtime {a_frame[1]} a frame; they differ by {worst:.1e} at most"
    )
    return worst


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=100)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--folder", help="where to keep step.onnx")
    main(**vars(parser.parse_args()))
