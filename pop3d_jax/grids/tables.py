"""Exported voxels as one Parquet table, a row for each voxel, for pandas, DuckDB and their kin."""

from collections.abc import Sequence

import numpy as np
from etils import epath

from pop3d_jax.data.records import RecordSource
from pop3d_jax.grids.selection import Selection, select
from pop3d_jax.inference import Predictor
from pop3d_jax.progress import progress
from pop3d_jax.voxels import voxel_centres

# Key frames predicted, and written as a row group, at a time.
_GROUP = 8


def write_parquet(
    out: epath.PathLike,
    predictor: Predictor,
    source: RecordSource,
    numbers: Sequence[int],
    selection: Selection,
    *,
    overwrite: bool = False,
) -> int:
    """Writes sample_token, scene_name, voxel x, y, z, centre in metres (lidar), occupancy and feature of every voxel.

    Args:
      out: local file.
      predictor: the trained network.
      source, numbers: records, and which of them.
      selection: which voxels; features are float16 whatever its precision would be, so it must say so.
      overwrite: replace a file that is there.

    Returns:
      The number of rows.

    Raises:
      ValueError: another precision than float16, or pyarrow is not installed.
      FileExistsError: the file is there.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ValueError("--format=parquet needs pyarrow: pip install 'pop3d-jax[parquet]'") from error
    if selection.precision != "float16":
        raise ValueError("--format=parquet stores features as float16: add --precision=float16")
    path = epath.Path(out)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists: choose another --out, or --overwrite")
    path.parent.mkdir(parents=True, exist_ok=True)
    volume, dim = predictor.student.volume, predictor.config.model.feature_dim
    schema = pa.schema(
        [("sample_token", pa.string()), ("scene_name", pa.string())]
        + [(name, pa.uint8()) for name in ("x", "y", "z")]
        + [(name, pa.float32()) for name in ("right", "ahead", "up")]
        + [("occupancy", pa.float16()), ("feature", pa.list_(pa.float16(), dim))]
    )
    rows = 0
    half = path.parent / f"{path.name}.partial"
    with pq.ParquetWriter(str(half), schema, compression="zstd") as writer:
        for start in progress(range(0, len(numbers), _GROUP), -(-len(numbers) // _GROUP), "exporting"):
            frames = [source[number] for number in numbers[start : start + _GROUP]]
            for frame, prediction in zip(frames, predictor.many(frames), strict=True):
                coordinates, occupancy, features = select(prediction, selection)
                centres = voxel_centres(coordinates, volume)
                count = len(coordinates)
                columns = [pa.array([frame.sample_token] * count), pa.array([frame.scene_name] * count)]
                columns += [pa.array(coordinates[:, axis].astype(np.uint8)) for axis in range(3)]
                columns += [pa.array(centres[:, axis].astype(np.float32)) for axis in range(3)]
                flat = pa.array(features.astype(np.float16).reshape(-1))
                columns += [pa.array(occupancy.astype(np.float16)), pa.FixedSizeListArray.from_arrays(flat, dim)]
                writer.write_table(pa.Table.from_arrays(columns, schema=schema))
                rows += count
    half.rename(path)
    return rows
