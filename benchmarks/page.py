"""Puts the benchmarks' results into docs/performance.md.

    python -m benchmarks.page

Every table stands between `<!-- table NAME -->` and `<!-- end -->` and comes from docs/results/NAME.json, which the
benchmarks write with --json docs/results; the text around the tables is written by hand.
"""

import json
import re
from pathlib import Path

from absl import app, flags

from benchmarks.report import markdown

_PAGE = flags.DEFINE_string("page", "docs/performance.md", "the page")
_RESULTS = flags.DEFINE_string("results", "docs/results", "folder of the results")

_PLACE = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(page: str, results: Path) -> str:
    """The page with its tables made anew.

    Raises:
      FileNotFoundError: a table of the page was never measured.
    """

    def table(found: re.Match) -> str:
        path = results / f"{found[2]}.json"
        if not path.exists():
            name, _, topology = re.sub(r"_(v\d\w)_", r"@\1:", found[2]).partition("@")
            more = f" --topology {topology}" if topology else ""
            raise FileNotFoundError(f"{path} is missing: run `python -m benchmarks.{name}{more} --json {results}`")
        return f"{found[1]}{markdown(json.loads(path.read_text()))}\n{found[3]}"

    return _PLACE.sub(table, page)


def main(_: list[str]) -> None:
    path = Path(_PAGE.value)
    try:
        path.write_text(filled(path.read_text(), Path(_RESULTS.value)))
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    app.run(main)
