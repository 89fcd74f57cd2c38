"""Read a dataset as an ingest does, without Ray."""

from __future__ import annotations

from pathlib import Path

from lorat.data.datasets import Findings, RawDataset, Recording
from lorat.data.shards import images
from lorat.data.shards.conversion import convert
from lorat.data.shards.manifest import dataset_info
from lorat.data.shards.verification import rebuild_index
from lorat.files import storage


def load_all(source: RawDataset) -> tuple[dict[str, Recording], dict[tuple[str, str], str]]:
    """Return recordings by name, and the reasons by (sequence, action)."""
    findings = Findings()
    found = {}
    for entry in source.entries(findings):
        for recording in source.load(entry, findings):
            found[recording.name] = recording
    reasons: dict[tuple[str, str], str] = {}
    for f in findings:
        key = (f.sequence, f.action)
        reasons[key] = "; ".join(filter(None, [reasons.get(key), f.why]))
    return found, reasons


def to_shards(source: RawDataset, folder: Path):
    """Convert without Ray; return the index and the findings."""
    findings = Findings()
    info = dataset_info(name=source.label, split=source.split_name, law=None)
    location = storage.locate(folder)
    location.make()
    with images.ShardWriter(location, "shard-00000.parquet", info) as writer:
        for entry in source.entries(findings):
            for recording in source.load(entry, findings):
                convert(
                    recording,
                    writer,
                    for_training=source.for_training,
                    law=None,
                    findings=findings,
                )
        writer.close()
    return rebuild_index(str(folder)), list(findings)
