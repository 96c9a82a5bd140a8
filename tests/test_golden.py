"""Every comparison of `python -m pop3d_jax.verify` with a golden set, one test a part."""

import jax
import pytest

from pop3d_jax.verification import maskclip_plus
from pop3d_jax.verification.families import FAMILIES, FULL_SIZE, run_part
from pop3d_jax.verification.golden_model import golden_set

# Half a minute and more each.
_SLOW = (maskclip_plus.full_width,)

_PARTS = [
    pytest.param(
        family,
        comparisons,
        id=f"{family}-{comparisons.__name__}",
        marks=[pytest.mark.slow] if comparisons in _SLOW else [],
    )
    for family, comparisons in FAMILIES
    if family != FULL_SIZE  # tests/models/test_full_model.py
]


@pytest.mark.golden
@pytest.mark.parametrize(("family", "comparisons"), _PARTS)
def test_equal_to_the_official_numbers(golden_dir, family, comparisons):
    with jax.default_matmul_precision("highest"):
        part = run_part(family, comparisons, golden_set(golden_dir))
    failed = [check for check in part.checks if not check.passed]
    assert not failed, "\n".join(
        f"{check.name}: difference {check.difference:.2e}, tolerance {check.tolerance:.2e} {check.note}"
        for check in failed
    )
    if part.missing:
        pytest.skip(f"the golden set {golden_dir} has no {part.missing}: set POP3D_GOLDEN_DIR to a folder that has it")
    assert part.checks
