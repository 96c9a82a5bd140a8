"""Independent pieces of work as an Apache Beam pipeline: here, or on Dataflow, Spark, Flink by its options."""

from collections.abc import Callable, Sequence
from typing import Any

from data_prep.parallel import Piece, WorkerError


def run(function: Callable[[Piece], Any], pieces: Sequence[Piece], options: Sequence[str], description: str) -> None:
    """Applies a function to every piece; what it returns is dropped, what it writes is the result.

    Args:
      function: can be pickled.
      pieces: its arguments; can be pickled.
      options: of Beam, such as `--runner=DataflowRunner`; none runs in this process.
      description: names the step.

    Raises:
      WorkerError: Beam is not installed, or a piece failed on a runner.
    """
    try:
        import apache_beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise WorkerError("--runner=beam needs the extra: pip install 'pop3d-jax[beam]'") from error
    try:
        with apache_beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
            # Reshuffled: otherwise a runner may keep all pieces on the worker that made them.
            _ = (
                pipeline
                | "pieces" >> apache_beam.Create(list(pieces))
                | "spread" >> apache_beam.Reshuffle()
                | description >> apache_beam.Map(function)
            )
    except RuntimeError as error:
        raise WorkerError(f"{description}: {error}") from error
