"""Which configuration gqa_attention's Hopper kernel takes."""

from diffattn.kernels.gqa_attention import hopper


def test_configuration_with_the_fewest_idle_programs():
    three, two = hopper.CONFIGS[64]
    # 132 programs: 48 heads of 4096 rows take 8 rounds of 192 rows or 12 of 128, 20 heads 4 (the last not full) or 5.
    assert hopper._config(64, hopper.NO_BIAS, 4096, 48, 132) == three
    assert hopper._config(64, hopper.NO_BIAS, 4096, 20, 132) == two
    assert hopper._config(64, hopper.NO_BIAS, 128, 132, 132) == two
    assert hopper._config(64, hopper.BIAS, 4096, 48, 132) == two
    assert hopper._config(65, hopper.INT8, 4096, 48, 132) == next(iter(hopper.CONFIGS[96]))
