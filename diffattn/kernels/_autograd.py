"""What the operators say to derivatives that their kernels do not have."""

import torch


def refuse_second_derivative(operator: str, instead: str = "set DIFFATTN_BACKEND=torch for one") -> None:
    """Make differentiating `operator`'s backward an error: torch by itself would warn and leave its part out."""

    def error(ctx, *grads):
        raise RuntimeError(f"{operator} has no second derivative; {instead}")

    torch.library.register_autograd(f"{operator}_backward", error)


def forward_mode() -> bool:
    """True under forward-mode differentiation, as in torch.func.jvp: an operator would return no tangent, so 0."""
    return torch.autograd.forward_ad._current_level >= 0
