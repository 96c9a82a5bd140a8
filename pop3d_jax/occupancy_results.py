"""Makes a page of results from a folder of reports: python -m pop3d_jax.occupancy_results --results DIR --out PAGE.md

The reports are those of `pop3d_jax.evaluate_occupancy --out DIR/NAME.json`. Each number stands beside its method,
labels, prompts, rule, classes, mask and command; scores against different ground truths stand in different tables.
"""

from absl import flags, logging
from etils import epath

from pop3d_jax.commands import run, stop_with_message
from pop3d_jax.occ3d.results_page import ReportError, read_reports, results_page


def _define_flags() -> None:
    flags.DEFINE_string("results", None, "Folder of the reports.")
    flags.DEFINE_string("out", None, "Page to write, Markdown; on the terminal by default.")


def main(_: list[str]) -> None:
    values = flags.FLAGS
    with stop_with_message(ReportError):
        page = results_page(read_reports(values.results))
    if not values.out:
        print(page, end="")
        return
    path = epath.Path(values.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page)
    logging.info("page: %s", path)


if __name__ == "__main__":
    _define_flags()
    flags.mark_flags_as_required(["results"])
    run(main)
