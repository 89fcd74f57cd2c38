"""Search crops: how the part of a frame around a target gets to the network's device.

B batch, S side of the crop, H W rows and columns of it, A both axes (rows, columns), T both taps
of the interpolation.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lorat.image.crops import Alignment, CropParams, align, resample, taps


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
        """Copy it to the device."""
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


class DeviceCrops:
    """Regions of the frames go up as they are, all in one copy, and are resampled on the device.

    One buffer, pinned for a GPU, holds a table with a row of float64 per crop, then the pixels.
    It is used again for every step, so only one step may be under way.
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

    def cut(
        self,
        frames: Sequence[np.ndarray],
        nominal: Sequence[CropParams],
        fill_rgb: Sequence[np.ndarray],
    ) -> tuple[list[CropParams], int]:
        """Return the adjusted parameters, and how many bytes of the buffer are sent."""
        aligned = [
            align(params, self._size, frame.shape[1], frame.shape[0])
            for frame, params in zip(frames, nominal, strict=True)
        ]
        regions = [_Region(frame, each) for frame, each in zip(frames, aligned, strict=True)]
        table = np.empty((len(frames), COLUMNS))
        end = table.nbytes // PIXEL
        for row, region, fill in zip(table, regions, fill_rgb, strict=True):
            row[:] = (*region.axes, end, region.width, *fill.tolist())
            region.first, end = end, end + region.num_lines * region.width
        self._make_room((end + 1) * PIXEL)  # of an empty region a pixel is read, too, and not used
        buffer = self._host.numpy()
        buffer[: table.nbytes].view(np.float64).reshape(table.shape)[:] = table
        self._threads.share(lambda region: region.copy_to(buffer), regions)
        return [each.adjusted for each in aligned], end * PIXEL

    def _make_room(self, num_bytes: int) -> None:
        """Double the buffers until so much fits; then they move, which must be rare."""
        room = len(self._host)
        while num_bytes > room:
            room *= 2
        if room > len(self._host):
            self._make_buffers(room)

    def send(self, packed: int) -> Tensor:
        """Copy the used part of the buffer; return the device's, always at the same place."""
        self._sent[:packed].copy_(self._host[:packed], non_blocking=True)
        return self._sent

    def crops(self, sent: Tensor, num: int) -> Tensor:
        """Resample the regions with the arithmetic of the host, to the same bits."""
        return resample_regions(sent, num, self._size)


class _Region:
    """The pixels of a frame that a crop is made of."""

    def __init__(self, frame: np.ndarray, aligned: Alignment) -> None:
        left, top, right, bottom = aligned.src
        self._patch = frame[top:bottom, left:right]
        out_left, out_top, out_right, out_bottom = aligned.out
        height, out_height = bottom - top, out_bottom - out_top
        self._lines: np.ndarray | None = None
        """Of the patch, a pair per row of the crop, where the crop does not need most of them."""
        if height > 2 * out_height:
            first, second, _ = taps(height, out_height)
            self._lines = np.stack([first, second], axis=1).ravel()
        self.num_lines = height if self._lines is None else len(self._lines)
        self.width = right - left
        self.first = 0
        """Place of its first pixel in the buffer, in pixels."""
        paired = float(self._lines is not None)
        self.axes = (
            *(_ratio(height, out_height), out_top, out_bottom, height, paired),
            *(_ratio(self.width, out_right - out_left), out_left, out_right, self.width, 0.0),
        )
        """Per axis: source pixels per crop pixel, begin and end in the crop, source pixels, and
        whether lines come in pairs."""

    def copy_to(self, buffer: np.ndarray) -> None:
        """Put the pixels into the buffer."""
        begin, end = self.first, self.first + self.num_lines * self.width
        place = buffer[begin * PIXEL : end * PIXEL].reshape(self.num_lines, self.width, PIXEL)
        place[:] = self._patch if self._lines is None else self._patch[self._lines]


def _ratio(num_in: int, num_out: int) -> float:
    """Return source pixels per crop pixel, as :func:`lorat.image.crops.taps` rounds it."""
    return float(np.float32(num_in) / np.float32(num_out)) if num_out else 0.0


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
    """Maps over a batch, on several threads where that can pay off."""

    def __init__(self) -> None:
        self._num = min(os.cpu_count() or 1, 8)
        self._pool: ThreadPoolExecutor | None = None

    def map(self, work: Any, items: Sequence[Any]) -> list[Any]:
        """Return the results in order."""
        if len(items) < 2 or self._num < 2:
            return list(map(work, items))
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._num, "crop")
        results: Iterable[Any] = self._pool.map(work, items)
        return list(results)

    def share(self, work: Any, items: Sequence[Any]) -> None:
        """Do what takes little time for each, some items on every thread."""
        shares = [items[first :: self._num] for first in range(min(self._num, len(items)))]
        self.map(lambda share: [work(item) for item in share], shares)
