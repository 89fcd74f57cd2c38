"""The public datasets of visual tracking as they are published, one module each."""

from __future__ import annotations

from lorat.data.datasets.coco import Coco
from lorat.data.datasets.findings import Finding, Findings
from lorat.data.datasets.folder import Folder, Video
from lorat.data.datasets.got10k import Got10k
from lorat.data.datasets.lasot import Lasot, LasotExt
from lorat.data.datasets.nfs import Nfs
from lorat.data.datasets.otb100 import Otb100
from lorat.data.datasets.records import Entry, RawDataset, Recording
from lorat.data.datasets.tnl2k import Tnl2k
from lorat.data.datasets.trackingnet import TrackingNet
from lorat.data.datasets.uav123 import Uav123
from lorat.data.datasets.vasttrack import VastTrack

DATASETS: dict[str, type[RawDataset]] = {
    "got10k": Got10k,
    "lasot": Lasot,
    "lasot_ext": LasotExt,
    "trackingnet": TrackingNet,
    "coco": Coco,
    "tnl2k": Tnl2k,
    "vasttrack": VastTrack,
    "otb100": Otb100,
    "uav123": Uav123,
    "nfs": Nfs,
    "folder": Folder,
    "video": Video,
}
"""Class of each dataset by the name it has on the command line."""

__all__ = [
    "DATASETS",
    "Coco",
    "Entry",
    "Finding",
    "Findings",
    "Folder",
    "Got10k",
    "Lasot",
    "LasotExt",
    "Nfs",
    "Otb100",
    "RawDataset",
    "Recording",
    "Tnl2k",
    "TrackingNet",
    "Uav123",
    "VastTrack",
    "Video",
]
