"""Regions: cut a part out of a JPEG without decoding the rest.

A JPEG with restart markers is a row of segments that are coded independently (ITU-T T.81, F.1.1
and B.2.4.4).  Where the segments divide the rows of blocks evenly, those that cover a region make
a smaller JPEG by themselves: the segments are joined, their markers numbered anew, and the size in
the frame header is changed.  Entropy decoding, which costs most, is then paid for the region only.
"""

from __future__ import annotations

import math

import numpy as np

_BLOCK = 16
"""Side of a coded unit of a JPEG whose colour has half the resolution, as OpenCV writes."""
_BLOCKS_PER_SEGMENT = 4
SEGMENT_WIDTH = _BLOCK * _BLOCKS_PER_SEGMENT
"""Pixels; images as wide as a multiple of it can be cut horizontally, too."""
_SMOOTHING = 2
"""Pixels at the cut that may differ, as the decoder interpolates colour across blocks."""
_HALF_COLOUR = bytes.fromhex("012200 021101 031101".replace(" ", ""))

Region = tuple[int, int, int, int]


def restart_interval(width: int) -> int:
    """Return the blocks per segment for an image of that width."""
    blocks = -(-width // _BLOCK)
    return _BLOCKS_PER_SEGMENT if blocks % _BLOCKS_PER_SEGMENT == 0 else blocks


def cut_region(
    jpeg: bytes, size_wh: tuple[int, int], region: tuple[float, float, float, float]
) -> tuple[bytes, Region] | None:
    """Cut the segments that cover a region out of a JPEG.

    Args:
        jpeg: a baseline JPEG.
        size_wh: its size.
        region: xyxy in its pixels; may leave it.

    Returns:
        A JPEG and the part it shows, in pixels of the given one; or none if this JPEG cannot be
        cut or it would not pay.
    """
    width, height = size_wh
    header = _read_header(jpeg)
    if header is None:
        return None
    size_at, scan_at, interval = header
    blocks_wide, blocks_high = -(-width // _BLOCK), -(-height // _BLOCK)
    # Restart markers set the decoder back, so what lies between two can stand anywhere; segments
    # must end with the rows of blocks, or a region's rows would begin in the middle of one.
    if interval == 0 or blocks_wide % interval:
        return None
    per_row = blocks_wide // interval
    step = interval * _BLOCK
    first_column, end_column = _cover(region[0], region[2], step, per_row)
    first_row, end_row = _cover(region[1], region[3], _BLOCK, blocks_high)
    if (end_column - first_column) * (end_row - first_row) == per_row * blocks_high:
        return None
    coded = np.frombuffer(jpeg, np.uint8)
    # In coded data a byte 0xFF is followed by 0x00; RST0 to RST7 are the only markers there.
    escapes = np.flatnonzero(coded[scan_at:-1] == 0xFF) + scan_at
    markers = escapes[(coded[escapes + 1] & 0xF8) == 0xD0]
    if len(markers) != per_row * blocks_high - 1 or not jpeg.endswith(b"\xff\xd9"):
        return None
    starts = [scan_at, *(markers + 2).tolist()]
    ends = [*markers.tolist(), len(jpeg) - 2]
    left, right = first_column * step, min(end_column * step, width)
    top, bottom = first_row * _BLOCK, min(end_row * _BLOCK, height)
    # The frame header has the height first, two bytes each.
    new_size = (bottom - top).to_bytes(2, "big") + (right - left).to_bytes(2, "big")
    parts = [jpeg[:size_at], new_size, jpeg[size_at + 4 : scan_at]]
    count = 0
    for row in range(first_row, end_row):
        for segment in range(row * per_row + first_column, row * per_row + end_column):
            if count:
                # Decoders expect the numbers of the markers in turn, from 0 again after 7.
                parts.append(bytes((0xFF, 0xD0 + (count - 1) % 8)))
            parts.append(jpeg[starts[segment] : ends[segment]])
            count += 1
    parts.append(b"\xff\xd9")
    return b"".join(parts), (left, top, right, bottom)


def _cover(low: float, high: float, step: int, count: int) -> tuple[int, int]:
    """Return the first and the end of the steps that cover an interval, at least one."""
    first = min(max(math.floor((low - _SMOOTHING) / step), 0), count - 1)
    end = max(min(math.ceil((high + _SMOOTHING) / step), count), first + 1)
    return first, end


def _read_header(jpeg: bytes) -> tuple[int, int, int] | None:
    """Return where the size stands, where the scan begins, and the restart interval.

    None for anything but a baseline JPEG of three components, colour at half resolution.
    """
    position, size_at, interval = 2, 0, 0
    while position + 4 <= len(jpeg) and jpeg[position] == 0xFF:
        marker = jpeg[position + 1]
        length = int.from_bytes(jpeg[position + 2 : position + 4], "big")
        if marker == 0xC0:
            components = jpeg[position + 9 : position + 2 + length]
            if components[:1] != b"\x03" or components[1:] != _HALF_COLOUR:
                return None
            size_at = position + 5
        elif marker == 0xDD:
            interval = int.from_bytes(jpeg[position + 4 : position + 6], "big")
        elif marker == 0xDA:
            return (size_at, position + 2 + length, interval) if size_at else None
        elif 0xC1 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return None
        position += 2 + length
    return None
