"""UNets with a LinFusion checkpoint: as LinFusion runs it, and loaded by diffattn.

    python benchmarks/linfusion.py

Random weights, in LinFusion's layout, on SD 1.5's and SDXL's UNets. LinFusion puts a module of its own in place of
each self-attention (Huage001/LinFusion, src/linfusion); here `Module` computes what that computes, in its order. Whole
forwards in bfloat16, batch 2, in turn, a turn being a picture's 20 steps; stock softmax attention beside them. Writes
linfusion.json to results/<gpu>: for each what models.py writes of a variant, the milliseconds of a forward replayed
from a CUDA graph, and how far the outputs of the two are from each other, rounding in bfloat16 included.
"""

import argparse
import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from models import Turns, build, build_sd15, compare, unet_inputs
from peers import linfusion
from report import environment, gpu_name, results_folder, write_json
from timing import Deadline, chosen, digits, interleave, reason
from torch import Tensor, nn

import diffattn
from diffattn.patch import find_layers


class Module(nn.Module):
    """LinFusion's attention: q and k of x + MLP(x), elu + 1, divided by the mean over keys."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        for name in ("to_q", "to_k", "to_v"):
            self.add_module(name, nn.Linear(width, width, bias=False))
        for name in ("to_q_", "to_k_"):
            layers = nn.Linear(width, width), nn.LayerNorm(width), nn.LeakyReLU(inplace=True), nn.Linear(width, width)
            self.add_module(name, nn.Sequential(*layers))
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(0.0)])

    def forward(self, hidden_states, encoder_hidden_states=None, attention_mask=None) -> Tensor:
        q = self.to_q(hidden_states + self.to_q_(hidden_states))
        k = self.to_k(hidden_states + self.to_k_(hidden_states))
        v = self.to_v(hidden_states)
        out = linfusion(*(x.unflatten(-1, (self.heads, -1)) for x in (q, k, v)))
        return self.to_out[1](self.to_out[0](out.flatten(2)))


def self_attentions(unet: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in unet.named_modules() if name.endswith("attn1")}


def write_checkpoint(unet: nn.Module, folder: Path) -> dict[str, Module]:
    """A LinFusion checkpoint of random weights for a UNet, and the modules that it holds, by name."""
    from safetensors.torch import save_file

    modules = {name: Module(attn.inner_dim, attn.heads) for name, attn in self_attentions(unet).items()}
    listed, tensors = [], {}
    for i, (name, module) in enumerate(modules.items()):
        width = module.to_q.in_features
        listed.append({"module_name": name, "dim_n": width, "heads": module.heads, "projection_mid_dim": None})
        tensors |= {f"{i}.{key}": tensor.contiguous() for key, tensor in module.state_dict().items()}
    (folder / "config.json").write_text(json.dumps({"_class_name": "LinFusion", "modules_list": listed}))
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    return modules


NAMES = ("stock", "linfusion", "diffattn")
STEPS = 20


class Variants(Turns):
    """A UNet that is stock, LinFusion's or diffattn's."""

    def __init__(self, unet: nn.Module, inputs: dict, folder: Path):
        super().__init__(NAMES, unet, inputs)
        self.attentions = self_attentions(unet)
        like = next(unet.parameters())
        modules = write_checkpoint(unet, folder)
        self.modules = {name: module.to(like.device, like.dtype).eval() for name, module in modules.items()}
        self.layers = {layer.name: layer for layer in find_layers(unet)}
        with diffattn.patched(unet, weights=str(folder)) as handle:
            self.processors = handle.installed

    def switch(self, variant: str) -> None:
        for name, module in (self.modules if variant == "linfusion" else self.attentions).items():
            self.model.set_submodule(name, module)
        for name, processor in self.processors.items():
            if self.layers[name].patched:
                self.layers[name].restore()
            if variant == "diffattn":
                self.layers[name].install(processor)


def build_sdxl() -> nn.Module:
    return build(
        "UNet2DConditionModel",
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
    )


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict]]] = {
    "SD 1.5 UNet 512px": (build_sd15, lambda: unet_inputs(64)),
    "SD 1.5 UNet 1024px": (build_sd15, lambda: unet_inputs(128)),
    "SD 1.5 UNet 2048px": (build_sd15, lambda: unet_inputs(256)),
    "SDXL UNet 1024px": (build_sdxl, lambda: unet_inputs(128, 2048)),
    "SDXL UNet 2048px": (build_sdxl, lambda: unet_inputs(256, 2048)),
    "SDXL UNet 4096px": (build_sdxl, lambda: unet_inputs(512, 2048)),
}


@torch.no_grad()
def measure(variants: Variants, seconds: float) -> dict:
    outputs = {}
    for name in NAMES:
        variants.switch(name)
        outputs[name] = variants.forward().float()
    far = (outputs["diffattn"] - outputs["linfusion"]).norm() / outputs["linfusion"].norm()
    del outputs
    rows = compare(variants, seconds, STEPS)
    for name, times in replayed(variants).items():
        rows[name]["graph_ms"] = times["median"]
    stock, theirs, ours = (rows[name] for name in NAMES)
    return rows | {
        "difference": digits(far.item(), 2),
        "speedup": digits(theirs["median"] / ours["median"]),
        "gpu_speedup": digits(theirs["gpu_ms"] / ours["gpu_ms"]),
        "graph_speedup": digits(theirs["graph_ms"] / ours["graph_ms"]),
        "speedup_over_stock": digits(stock["median"] / ours["median"]),
    }


def replayed(variants: Variants) -> dict[str, dict]:
    """What `timing.interleave` gives for a forward of each variant, recorded once as a CUDA graph.

    No time of the CPU's is in it.
    """
    graphs = {}
    for name in variants.names:
        variants.switch(name)
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            variants.forward()
    variants.switch(variants.names[0])
    return interleave({name: graph.replay for name, graph in graphs.items()}, seconds=2)


def run(out: Path, only: list[str] | None, seconds: float, each: float) -> None:
    warnings.simplefilter("ignore")
    deadline, rows, left_out = Deadline(seconds), [], []
    head = {"environment": environment(), "batch": 2, "dtype": "bfloat16", "left_out": left_out, "rows": rows}
    built_by, unet = None, None
    with tempfile.TemporaryDirectory() as folder:
        for name, (make, inputs) in CASES.items():
            if not chosen(name, only):
                continue
            if deadline.passed:
                left_out.append(name)
                continue
            try:
                if make is not built_by:
                    unet = None
                    torch.cuda.empty_cache()
                    with torch.device("cuda"):
                        unet, built_by = make().to(torch.bfloat16).eval(), make
                row = {"case": name} | measure(Variants(unet, inputs(), Path(folder)), each)
                print(
                    f"{name:<20} stock {row['stock']['median']:8.2f} ms  LinFusion {row['linfusion']['median']:8.2f}  "
                    f"diffattn {row['diffattn']['median']:8.2f}  {row['speedup']:.2f}x LinFusion "
                    f"(GPU {row['gpu_speedup']:.2f}x, CUDA graph {row['graph_speedup']:.2f}x), "
                    f"{row['speedup_over_stock']:.2f}x stock  "
                    f"difference {row['difference']:.1e}",
                    flush=True,
                )
            except Exception as error:  # a case that cannot run is a row with its reason
                row, built_by = {"case": name, "failed": reason(error)}, None
                print(f"{name}: {row['failed']}", flush=True)
            rows.append(row)
            write_json(out / "linfusion.json", head | {"seconds": round(deadline.elapsed, 1)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for linfusion.json; results/<gpu> if not given")
    parser.add_argument("--only", action="append", help="glob over the cases' names; may be repeated")
    parser.add_argument("--seconds", type=float, default=200, help="start no case after this long")
    parser.add_argument("--each", type=float, default=6, help="seconds for a variant's timing")
    args = parser.parse_args()
    if not any(chosen(name, args.only) for name in CASES):
        parser.error(f"--only: {args.only} matches none of {', '.join(CASES)}")
    run(args.out or results_folder(gpu_name()), args.only, args.seconds, args.each)


if __name__ == "__main__":
    main()
