"""Reads what a person wants to know out of XLA's text of a compiled program: collectives, and large arrays."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16, "bf16": 2, "f16": 2}
_COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(")
# What only gives another name to memory that something else has made.
_NO_MEMORY = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant", "while", "conditional", "call")


@dataclasses.dataclass(frozen=True)
class LargeArray:
    """One array that the program writes to main memory.

    Attributes:
      bytes: with the padding of its tiles.
      shape: as XLA writes it, without the layout.
      operation: the JAX operation, from the outside in.
      source: file and line that made it, "" where XLA does not say.
    """

    bytes: int
    shape: str
    operation: str
    source: str


def array_bytes(element: str, shape: str, layout: str | None = None, tiles: str | None = None) -> int:
    """Bytes of an array, padded to whole tiles where its layout has them: f32[3,5]{1,0:T(8,128)} takes 4,096."""
    width = _BYTES.get(element, int(re.sub(r"\D", "", element) or 8) / 8)
    sizes = [int(size) for size in shape.split(",") if size]
    tile = re.search(r"T\(([\d,]+)\)", tiles or "")
    if tile and layout is not None:
        tile_sizes = [int(size) for size in tile[1].split(",")]
        # The minor-most dimensions are tiled; the layout lists dimensions from minor to major.
        order = [int(axis) for axis in layout.split(",") if axis]
        minor = list(zip(order, reversed(tile_sizes), strict=False))
        for axis, side in minor:
            sizes[axis] = -(-sizes[axis] // side) * side
        if len(tile_sizes) > len(order):
            sizes.append(math.prod(tile_sizes[: len(tile_sizes) - len(order)]))
    return int(math.prod(sizes) * width)


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """Collectives of a program: how many there are of each kind, and the bytes of their results on one device.

    A collective inside a loop counts once.
    """
    found: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    for _, result, operation, _ in _instructions(text):
        kind = operation.removesuffix("-start")
        if kind in _COLLECTIVES:
            sizes = [array_bytes(*match) for match in _ARRAY.findall(result)]
            found[kind][0] += 1
            # The start of an asynchronous one also hands on its operand.
            found[kind][1] += max(sizes, default=0) if operation.endswith("-start") else sum(sizes)
    return {kind: (count, size) for kind, (count, size) in sorted(found.items())}


def largest_arrays(text: str, count: int) -> list[LargeArray]:
    """The largest arrays in main memory that no fusion keeps to itself, one for each shape and source line."""
    places = _source_lines(text)
    seen: dict[tuple[str, str], LargeArray] = {}
    for _, result, operation, line in _instructions(text):
        if operation in _NO_MEMORY or operation.endswith("-done"):
            continue
        for element, shape, layout, tiles in _ARRAY.findall(result):
            if "S(" in tiles:  # on the chip, not in main memory
                continue
            frame = re.search(r"stack_frame_id=(\d+)", line)
            source = places.get(int(frame[1]), "") if frame else ""
            name = re.search(r'op_name="([^"]*)"', line)
            array = LargeArray(
                array_bytes(element, shape, layout, tiles),
                f"{element}[{shape}]",
                name[1] if name else operation,
                source,
            )
            seen.setdefault((array.shape, array.source), array)
    return sorted(seen.values(), key=lambda array: -array.bytes)[:count]


def _instructions(text: str) -> Iterator[tuple[str, str, str, str]]:
    """Name, result type, operation and line of every instruction outside of fused computations."""
    fused = set(re.findall(r"fusion\(.*?calls=%?([\w.\-]+)", text))
    inside = False
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            header = re.match(r"(?:ENTRY )?%?([\w.\-]+)", line)
            inside = header is not None and header[1] in fused
        elif not inside and (match := _INSTRUCTION.match(line)):
            yield match[1], match[2], match[3], line


def _source_lines(text: str) -> dict[int, str]:
    """From a stack frame's number to the innermost file and line of this project (else of anything)."""
    tables: dict[str, dict[int, str]] = {}
    current = ""
    for line in text.splitlines():
        if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            current = line
            tables[current] = {}
        elif current and (match := re.match(r"(\d+) (.*)", line)):
            tables[current][int(match[1])] = match[2]
        elif line.startswith(("%", "ENTRY")):
            break

    def number(entry: str, name: str) -> int:
        found = re.search(rf"{name}=(\d+)", entry)
        return int(found[1]) if found else 0

    def place(frame: int) -> str:
        location = tables["FileLocations"].get(number(tables["StackFrames"][frame], "file_location_id"), "")
        file = tables["FileNames"].get(number(location, "file_name_id"), "").strip('"')
        return f"{file}:{number(location, 'line')}"

    def own(frame: int) -> str:
        first, steps = place(frame), 0
        while frame and steps < 100:
            here = place(frame)
            if "/pop3d_jax/" in here:
                return here[here.rindex("/pop3d_jax/") + 1 :]
            parent = number(tables["StackFrames"].get(frame, ""), "parent_frame_id")
            # A frame that is its own parent, or comes after it, is the outermost.
            if not 0 < parent - 1 < frame:
                break
            frame, steps = parent - 1, steps + 1
        return first

    return {frame: own(frame) for frame in tables.get("StackFrames", {})}
