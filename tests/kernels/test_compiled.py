"""A compiled call runs the operators, an exported one plain torch."""

import pytest
import torch

from diffattn.kernels import gqa_attention, linear_attention

CALLS = {
    "linear_attention": lambda q, k, v: linear_attention(q, k, v),
    "gqa_attention": lambda q, k, v: gqa_attention(q, k, v),
    "gqa_attention int8": lambda q, k, v: gqa_attention(q, k, v, precision="int8"),
}


def make(device):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 20, heads, 16, generator=generator).half().to(device) for heads in (4, 2, 2)]


def operators(graph: torch.fx.GraphModule) -> set[str]:
    targets = (node.target for node in graph.graph.nodes if node.op == "call_function")
    return {str(target) for target in targets if str(target).startswith("diffattn")}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("training", [False, True])
def test_a_compiled_call_runs_the_operator(name, training, device, triton_backend):
    if training and name.endswith("int8"):
        pytest.skip("int8 has no gradient")
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    tensors = [x.requires_grad_(training) for x in make(device)]
    torch.compiler.reset()
    torch.compile(CALLS[name], fullgraph=True, backend=keep)(*tensors)
    (graph,) = graphs
    assert operators(graph)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_call_is_plain_torch(name, strict, device, triton_backend):
    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return CALLS[name](q, k, v)

    assert not operators(torch.export.export(Module(), tuple(make(device)), strict=strict).graph_module)
