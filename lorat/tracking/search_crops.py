"""Search crops: how the part of a frame around a target gets to the network's device.

B batch, S side of the crop, H W rows and columns of it, A both axes (rows, columns), T both taps
of the interpolation.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lorat.image.crops import Alignment, CropParams, align, resample, round_pair, taps


class SearchCrops(Protocol):
    """A way to the device; the crops are the same on each."""

    def cut(
        self,
        frames: Sequence[np.ndarray],
        nominal: Sequence[CropParams],
        fill_rgb: Sequence[np.ndarray],
    ) -> tuple[list[CropParams], Any]:
        """Cut what the crops are made of.

        Args:
            frames: uint8 RGB (h, w, 3) of any size.
            nominal: crops, one per frame.
            fill_rgb: colours outside of the frames, float32, 0 to 255.

        Returns:
            The adjusted parameters, and what is sent.
        """
        ...

    def send(self, packed: Any) -> Tensor:
        """Copy it to the device, or what is left of it."""
        ...

    def crops(self, sent: Tensor, num: int) -> Tensor:
        """Return the crops on the device, float32 (B, S, S, 3), 0 to 255."""
        ...


class HostCrops:
    """Crops are made on the host, which is fastest where the host is the device."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._size = size
        self._device = device
        self._threads = _Threads()

    def cut(
        self,
        frames: Sequence[np.ndarray],
        nominal: Sequence[CropParams],
        fill_rgb: Sequence[np.ndarray],
    ) -> tuple[list[CropParams], np.ndarray]:
        """Return the adjusted parameters, and the crops, float32 (B, S, S, 3)."""
        made = self._threads.map(
            lambda given: resample(given[0], given[1], self._size, given[2]),
            list(zip(frames, nominal, fill_rgb, strict=True)),
        )
        return [adjusted for _, adjusted in made], np.stack([crop_HWC for crop_HWC, _ in made])

    def send(self, packed: np.ndarray) -> Tensor:
        """Copy the crops."""
        return torch.from_numpy(packed).to(self._device)

    def crops(self, sent: Tensor, num: int) -> Tensor:
        """Return what was sent."""
        return sent


PIXEL = 3
"""Bytes of a pixel."""
COLUMNS = 15
"""Numbers in a row of the table; its bytes are whole pixels, too."""
FIRST_BYTES = COLUMNS * 8 << 15
"""Size of the first buffer, 3.9 MB, enough for any region of one 720p frame; also whole pixels."""
PART_BYTES = 1 << 19
"""Of regions that one thread packs at a time: worth starting a copy to the device for."""
WHOLE_LINES = 2.75
"""Lines of a region per row of the crop up to which packing all is faster than picking two each."""
STRIP_LINES = 128
"""Lines that are picked at a time, so that the processor's cache holds them until they are packed.
"""


class DeviceCrops:
    """Regions of the frames go up as they are, and are resampled on the device.

    One buffer, pinned for a GPU, holds a table with a row of float64 per crop, then the pixels.
    Its parts are packed by several threads, and each goes up while the next ones are packed.

    The buffer is used again for every step, so only one step may be under way.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self._size = size
        self._device = device
        self._threads = _Threads()
        self._make_buffers(FIRST_BYTES)

    def _make_buffers(self, num_bytes: int) -> None:
        pinned = self._device.type == "cuda"
        self._host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pinned)
        self._sent = torch.zeros(num_bytes, dtype=torch.uint8, device=self._device)
        self._num_sent = 0

    def cut(
        self,
        frames: Sequence[np.ndarray],
        nominal: Sequence[CropParams],
        fill_rgb: Sequence[np.ndarray],
    ) -> tuple[list[CropParams], int]:
        """Return the adjusted parameters, and how many bytes of the buffer are sent.

        Of several parts all but those that were packed last are on their way already.
        """
        end = len(frames) * COLUMNS * 8 // PIXEL
        adjusted: list[CropParams] = []
        table: list[float] = []
        parts: list[list[_Region]] = []
        part_end = end
        for frame, params, fill in zip(frames, nominal, fill_rgb, strict=True):
            aligned = align(params, self._size, frame.shape[1], frame.shape[0])
            adjusted.append(aligned.adjusted)
            region = _Region(frame, aligned, end)
            table += (*region.axes, end, region.width, *fill.tolist())
            if end >= part_end:
                parts.append([])
                part_end = end + PART_BYTES // PIXEL
            parts[-1].append(region)
            end = region.end
        self._make_room((end + 1) * PIXEL)  # of an empty region a pixel is read, too, and not used
        buffer = self._host.numpy()
        buffer[: len(table) * 8].view(np.float64)[:] = table
        self._num_sent = 0

        def send_packed(num_parts: int) -> None:
            if num_parts < len(parts):
                self._send_up_to(parts[num_parts][0].first * PIXEL)

        self._threads.in_order(lambda part: _pack(part, buffer), parts, send_packed)
        return adjusted, end * PIXEL

    def _send_up_to(self, end: int) -> None:
        waiting = slice(self._num_sent, end)
        self._sent[waiting].copy_(self._host[waiting], non_blocking=True)
        self._num_sent = end

    def _make_room(self, num_bytes: int) -> None:
        """Double the buffers until so much fits; then they move, which must be rare."""
        room = len(self._host)
        while num_bytes > room:
            room *= 2
        if room > len(self._host):
            self._make_buffers(room)

    def send(self, packed: int) -> Tensor:
        """Copy what has not gone up yet; return the device's buffer, always at the same place."""
        self._send_up_to(packed)
        return self._sent

    def crops(self, sent: Tensor, num: int) -> Tensor:
        """Resample the regions with the arithmetic of the host, to the same bits."""
        return resample_regions(sent, num, self._size)


class _Region:
    """The pixels of a frame that a crop is made of, and their place in the buffer."""

    def __init__(self, frame: np.ndarray, aligned: Alignment, first: int) -> None:
        left, top, right, bottom = aligned.src
        out_left, out_top, out_right, out_bottom = aligned.out
        self._patch = frame[top:bottom, left:right]
        self._height, self._out_height = bottom - top, out_bottom - out_top
        out_width = out_right - out_left
        self.width = right - left
        # Where the crop does not need most lines, a pair of them per row of it.
        self._paired = self._height > WHOLE_LINES * self._out_height
        self.first = first
        """Its first pixel in the buffer, in pixels, and the end of its last."""
        self._num_lines = 2 * self._out_height if self._paired else self._height
        self.end = first + self._num_lines * self.width
        ratio_y = ratio_x = 0.0
        if out_width:  # as crops.taps rounds them
            ratio_y, ratio_x = round_pair(self._height / self._out_height, self.width / out_width)
        self.axes = (
            *(ratio_y, out_top, out_bottom, self._height, self._paired),
            *(ratio_x, out_left, out_right, self.width, False),
        )
        """Per axis: source pixels per crop pixel, begin and end in the crop, source pixels, and
        whether lines come in pairs."""

    def copy_to(self, buffer: np.ndarray) -> None:
        """Put the pixels into the buffer."""
        place = buffer[self.first * PIXEL : self.end * PIXEL]
        place = place.reshape(self._num_lines, self.width, PIXEL)
        if not self._paired:
            place[:] = self._patch
            return
        first, second, _ = taps(self._height, self._out_height)
        lines = np.stack([first, second], axis=1).ravel()
        for begin in range(0, len(lines), STRIP_LINES):
            strip = slice(begin, begin + STRIP_LINES)
            place[strip] = self._patch[lines[strip]]


def _pack(regions: Sequence[_Region], buffer: np.ndarray) -> None:
    for region in regions:
        region.copy_to(buffer)


def resample_regions(buffer: Tensor, num: int, size: int) -> Tensor:
    """Make crops of regions, as :func:`lorat.image.crops.resample` does, with torch alone.

    No size of a region decides which kernels run, so a recorded call fits all.

    Args:
        buffer: uint8, a table of ``num`` rows and then pixels; see :class:`DeviceCrops`.
        num: number of crops.
        size: their side.

    Returns:
        float32 (B, S, S, 3), 0 to 255.
    """
    table_BK = buffer[: num * COLUMNS * 8].view(torch.float64).view(num, COLUMNS)
    ratio, begin, end, count, paired = table_BK[:, :10].reshape(num, 2, 5, 1).unbind(2)  # BA1
    first_pixel_B11, width_B11 = table_BK[:, 10, None, None], table_BK[:, 11, None, None]
    place_S = torch.arange(size, dtype=torch.float64, device=buffer.device)
    step_BAS = torch.clamp(torch.minimum(place_S, end - 1) - begin, min=0)
    # In float64, rounded to float32 once, as by crops.taps.
    position_BAS = (ratio * (step_BAS + 0.5) - 0.5).float().clamp(min=0)
    first_BAS = torch.minimum(position_BAS.floor(), (count - 1).clamp(min=0).float())
    weight_BAS = (position_BAS - first_BAS).clamp(max=1)
    second_BAS = torch.minimum(first_BAS + 1, (count - 1).clamp(min=0).float())
    line_BTAS = torch.stack(
        [
            torch.where(paired != 0, 2 * step_BAS, first_BAS.double()),
            torch.where(paired != 0, 2 * step_BAS + 1, second_BAS.double()),
        ],
        dim=1,
    )
    row_BTH = (first_pixel_B11 + line_BTAS[:, :, 0] * width_B11).long()
    column_BTW = line_BTAS[:, :, 1].long()
    index_BTTHW = row_BTH[:, :, None, :, None] + column_BTW[:, None, :, None, :]
    pixels = buffer.view(-1, PIXEL).index_select(0, index_BTTHW.flatten())
    top, bottom = pixels.view(num, 2, 2, size, size, PIXEL).float().unbind(1)
    # Multiplied and added in two steps each: fused they would round differently.
    left, right = ((bottom - top) * weight_BAS[:, None, 0, :, None, None] + top).unbind(1)
    crop_BHW3 = (right - left) * weight_BAS[:, None, 1, :, None] + left
    inside_BAS = (place_S >= begin) & (place_S < end)
    inside_BHW = inside_BAS[:, 0, :, None] & inside_BAS[:, 1, None, :]
    fill_B113 = table_BK[:, None, None, 12:].float()
    return torch.where(inside_BHW[..., None], crop_BHW3, fill_B113)


class _Threads:
    """Works on a batch, on several threads where that can pay off."""

    def __init__(self) -> None:
        self._num = min(os.cpu_count() or 1, 8)
        self._started: ThreadPoolExecutor | None = None

    def map(self, work: Any, items: Sequence[Any]) -> list[Any]:
        """Return the results in order."""
        if len(items) < 2 or self._num < 2:
            return list(map(work, items))
        results: Iterable[Any] = self._pool().map(work, items)
        return list(results)

    def in_order(
        self,
        work: Callable[[Any], None],
        items: Sequence[Any],
        first_done: Callable[[int], None],
    ) -> None:
        """Work on all items, the first ones first.

        On return no thread is at work any more, also if one has failed.

        Args:
            work: called with each item.
            items: each is worth the switch to another thread.
            first_done: called on this thread with how many of the first items are done, whenever
                there are more.
        """
        if len(items) < 2 or self._num < 2:
            for num_done, item in enumerate(items, start=1):
                work(item)
                first_done(num_done)
            return
        take = itertools.count().__next__
        told: SimpleQueue[int | None] = SimpleQueue()

        def take_part() -> None:
            try:
                while (number := take()) < len(items):
                    work(items[number])
                    told.put(number)
            finally:
                told.put(None)

        threads = [self._pool().submit(take_part) for _ in range(min(self._num, len(items)))]
        try:
            num_at_work, num_first = len(threads), 0
            done: set[int] = set()
            while num_at_work:
                number = told.get()
                if number is None:
                    num_at_work -= 1
                    continue
                done.add(number)
                if number == num_first:
                    while num_first in done:
                        num_first += 1
                    first_done(num_first)
        finally:
            errors = [thread.exception() for thread in threads]
        for error in errors:
            if error is not None:
                raise error

    def _pool(self) -> ThreadPoolExecutor:
        if self._started is None:
            self._started = ThreadPoolExecutor(self._num, "crop")
        return self._started
