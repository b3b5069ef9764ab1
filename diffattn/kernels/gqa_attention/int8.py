"""What the int8 kernel and its reference agree on."""


def rotation_group(D: int) -> int:
    """How many features Hadamard's matrix turns at a time: the largest power of two that divides D, at most 128."""
    group = 1
    # Not D & -D: torch.compile may trace D as a symbol, which has no bitwise operators.
    while group < 128 and D % (2 * group) == 0:
        group *= 2
    return group
