"""What the tests of every kernel measure errors by."""


def relative_error(actual, expected):
    """Frobenius; absolute where the expected values are 0 but for float64's rounding, as gradients can be."""
    norm = expected.norm()
    return ((actual.double() - expected).norm() / (norm if norm > 1e-9 else 1.0)).item()
