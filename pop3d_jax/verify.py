"""Compares this package with the official implementation's numbers: python -m pop3d_jax.verify --golden DIR

DIR is a golden set: inputs, settings and results of the official code, with reference weights that a small Python file
of the set computes (that file is executed). Prints one line a comparison: family, array, tolerance, largest
difference, ok or FAIL. Exit status: 0 all within tolerance, 1 something is not, 2 nothing was compared.
"""

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
from absl import flags

from pop3d_jax.commands import run, stop_with_message
from pop3d_jax.verification.checks import Check
from pop3d_jax.verification.families import FULL_SIZE, compare

_SHIPPED = Path(__file__).resolve().parent.parent / "tests" / "golden"
_FAMILY_WIDTH, _NAME_WIDTH = 13, 46


def verify(golden: Path, *, only: str = "", full_size: bool = False, json_file: Path | None = None) -> int:
    """Runs the comparisons and prints their outcome.

    Args:
      golden: folder of the golden set.
      only: part of the names of the families to compare; all by default.
      full_size: also the network of the published size, which takes minutes and gigabytes.
      json_file: also writes the outcome there, as a list of objects.

    Returns:
      The exit status: 0, 1 if something is beyond its tolerance, 2 if nothing was compared.

    Raises:
      ValueError: no such folder or family.
    """
    start = time.monotonic()
    rows: list[dict[str, Any]] = []
    skipped: set[tuple[str, str]] = set()
    # Accelerators would multiply in less than float32 otherwise.
    with jax.default_matmul_precision("highest"):
        for part in compare(golden, only, full_size):
            width = max([_NAME_WIDTH, *(len(check.name) for check in part.checks)])
            for check in part.checks:
                print(_line(part.family, check, width), flush=True)
                rows.append(_row(part.family, check))
            if part.missing and (part.family, part.missing) not in skipped:
                skipped.add((part.family, part.missing))
                print(f"{part.family:<{_FAMILY_WIDTH}} skipped: {golden} has no {part.missing}", flush=True)
    if json_file is not None:
        json_file.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    note = "" if full_size or only not in FULL_SIZE else "; the full-size network needs --full_size"
    if not rows:
        print(f"nothing was compared: {golden} has none of the golden files that are needed{note}")
        return 2
    failed = sum(not row["passed"] for row in rows)
    seconds = time.monotonic() - start
    outcome = f"{failed} FAILED" if failed else "all within tolerance"
    print(f"{len(rows)} comparisons on {jax.default_backend()} in {seconds:.0f} s: {outcome}{note}")
    return 1 if failed else 0


def _line(family: str, check: Check, width: int) -> str:
    status = "ok" if check.passed else "FAIL"
    numbers = f"{check.tolerance:>9.2e}  {check.difference:>9.2e}"
    return f"{family:<{_FAMILY_WIDTH}} {check.name:<{width}}  {numbers}  {status:<4}  {check.note}".rstrip()


def _row(family: str, check: Check) -> dict[str, Any]:
    return {
        "family": family,
        "name": check.name,
        "tolerance": check.tolerance,
        # JSON knows no infinity.
        "difference": check.difference if math.isfinite(check.difference) else None,
        "passed": check.passed,
        "note": check.note,
    }


def _define_flags() -> None:
    """Not at import, so that several commands can be imported side by side."""
    flags.DEFINE_string(
        "golden",
        str(_SHIPPED) if _SHIPPED.is_dir() else None,
        "Folder of the golden set. The files reference_weights.py in it are EXECUTED: name only sets that you trust.",
    )
    flags.DEFINE_string("only", "", "Compare the families whose name contains this.")
    flags.DEFINE_bool("full_size", False, "Also the network of the published size: minutes and gigabytes.")
    flags.DEFINE_string("json", None, "File to write the outcome to.")
    if not _SHIPPED.is_dir():
        flags.mark_flag_as_required("golden")


def main(_: list[str]) -> None:
    # Nearly all of the time would be compilation of programs that run for milliseconds. Read when the first device is
    # asked for, so a choice in the environment stands.
    chosen = os.environ.get("XLA_FLAGS", "")
    if "xla_backend_optimization_level" not in chosen:
        os.environ["XLA_FLAGS"] = f"{chosen} --xla_backend_optimization_level=0".strip()
    with stop_with_message(ValueError, OSError):
        status = verify(
            Path(flags.FLAGS.golden),
            only=flags.FLAGS.only,
            full_size=flags.FLAGS.full_size,
            json_file=Path(flags.FLAGS.json) if flags.FLAGS.json else None,
        )
    sys.exit(status)


if __name__ == "__main__":
    _define_flags()
    run(main)
