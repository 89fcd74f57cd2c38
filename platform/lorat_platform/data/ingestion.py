"""Ingest: published datasets to shards, one Ray task per shard.

A shard appears under its name when it is whole, then its *receipt* (the rows of the index and
what was found odd) in the work folder.  A run that is stopped leaves whole shards and receipts;
the same command later does only what has no receipt.  The index and ``dataset.json`` come last.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import socket
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from lorat.config.json_files import parse_json, read_json_at
from lorat.config.variants import get_variant
from lorat.data.datasets import DATASETS, Entry, Finding, Findings, RawDataset
from lorat.data.shards import images
from lorat.data.shards.conversion import convert
from lorat.data.shards.frame_index import FrameIndex
from lorat.data.shards.manifest import MANIFEST, WORK_FOLDER, dataset_info, shard_name
from lorat.data.shards.rows import manifest_entry
from lorat.data.shards.verification import index_shards
from lorat.data.shards.windows import WindowLaw
from lorat.errors import UserError
from lorat.files import storage
from lorat.metrics.attributes import by_attribute, read_attributes
from lorat_platform.runs.claim import Lease

log = logging.getLogger(__name__)

REPORT = "report.json"
_PLAN = "plan.json"
_RECEIPT_SHAPE: dict[str, Any] = {
    "findings": [Finding],
    "attributes": dict[str, list[str]],
    "shard": dict[str, Any] | None,
}
_FRAMES_PER_SHARD = 8192
_MIN_SHARDS = 64
_MAX_TABLE_ROWS = 400


@dataclass(frozen=True, kw_only=True)
class IngestConfig:
    """What is made of a dataset, and where."""

    output: str
    """Folder of the shards: a local path, s3://BUCKET/PATH or gs://BUCKET/PATH."""
    full_frame: bool = False
    """Store whole frames of training sets too, instead of windows around the target."""
    attributes: Path | None = None
    """CSV file with a sequence and its attributes per line, for the tables of an evaluation; beside
    those that GOT-10k and UAV123 bring along."""
    variant: str = "B-224"
    """Largest variant that the windows shall serve, such as B-224 or L-378."""
    address: str | None = None
    """Ray cluster, host:port; none means RAY_ADDRESS, or an embedded Ray."""

    def __post_init__(self) -> None:
        get_variant(self.variant)


@dataclass(frozen=True, kw_only=True)
class Ingested:
    """The result of an ingest."""

    index: FrameIndex
    findings: list[Finding]


def ingest(source: RawDataset, config: IngestConfig) -> Ingested:
    """Make the shards of a dataset with all CPUs of the connected Ray cluster.

    Raises:
        UserError: if the source has another layout, nothing usable is in it, or the output
            holds something else or cannot be written.
    """
    source = with_absolute_paths(source)
    findings = Findings()
    entries = source.entries(findings)
    windowed = source.for_training and not config.full_frame
    law = WindowLaw.for_variant(get_variant(config.variant)) if windowed else None
    name = getattr(source, "name", source.label)
    info = dataset_info(name=name, split=source.split_name, law=law)
    groups = group_entries(entries, source.frames_hint)
    location = storage.locate(config.output)
    plan = _describe_plan(source, info, entries)
    given: dict[str, list[str]] = {}
    if config.attributes is not None:
        given = read_attributes(config.attributes)
        plan["attributes"] = given
    with storage.writing_to(location):
        location.make()
        if location.exists(MANIFEST):
            return _already_there(location, plan)
    what = f"The ingest into {location.uri}"
    with Lease(location, what, "give another --output").claim() as lease:
        with storage.writing_to(location):
            if location.exists(MANIFEST):  # who had the right until now has finished it
                return _already_there(location, plan)
            work = location.child(WORK_FOLDER)
            work.make()
            _check_plan(location, work, plan)
            receipts = set(work.names())
        missing = [n for n in range(len(groups)) if receipt_name(n) not in receipts]
        if len(missing) < len(groups):
            log.info("%d of %d shards are already there.", len(groups) - len(missing), len(groups))
        arguments = [
            (source, groups[n], location.uri, n, info, law, source.for_training) for n in missing
        ]
        whole = len(groups) - len(missing)
        try:
            for _ in map_tasks(write_shard, arguments, what=f"ingest {name} {source.split_name}"):
                whole += 1
                lease.check()
        except KeyboardInterrupt:
            log.info("%d of %d shards are whole and kept.", whole, len(groups))
            raise
        lease.confirm()
        with storage.writing_to(location):
            return _finish(location, info, len(groups), findings, plan, given)


def with_absolute_paths(source: RawDataset) -> RawDataset:
    """Return the source with absolute paths: tasks have other working directories."""
    paths = {f.name: getattr(source, f.name) for f in dataclasses.fields(source)}
    return dataclasses.replace(
        source,
        **{n: p.expanduser().absolute() for n, p in paths.items() if isinstance(p, Path)},
    )


def group_entries(entries: Sequence[Entry], frames_hint: int) -> list[list[Entry]]:
    """Split entries into shards: about 8,000 frames each, but at least 64 shards if there are
    as many entries, so that small datasets use many CPUs too.

    It depends on nothing but the entries, so that a resumed run makes the same shards.
    """
    size = max(1, min(_FRAMES_PER_SHARD // frames_hint, -(-len(entries) // _MIN_SHARDS)))
    return [list(entries[i : i + size]) for i in range(0, len(entries), size)]


def receipt_name(number: int) -> str:
    """Return the file name of a shard's receipt in the work folder."""
    return f"receipt-{number:05d}.arrow"


def write_shard(
    source: RawDataset,
    entries: list[Entry],
    uri: str,
    number: int,
    info: dict[str, Any],
    law: WindowLaw | None,
    for_training: bool,
) -> int:
    """Convert some entries into one shard and leave its receipt; return the number of frames.

    Raises:
        UserError: if the dataset is not to be seen on this machine, or the shard cannot be written.
    """
    import cv2

    cv2.setNumThreads(1)
    if not source.source.exists():
        raise UserError(
            f"{source.source} is not there on {socket.gethostname()}, a machine of the cluster; "
            "give a --source that all of them see, such as a shared folder."
        )
    location = storage.locate(uri)
    with storage.writing_to(location):
        return _write_shard(source, entries, location, number, info, law, for_training)


def _write_shard(
    source: RawDataset,
    entries: list[Entry],
    location: storage.Location,
    number: int,
    info: dict[str, Any],
    law: WindowLaw | None,
    for_training: bool,
) -> int:
    findings = Findings()
    attributes: dict[str, tuple[str, ...]] = {}
    file = shard_name(number)
    with images.ShardWriter(location, file, info) as writer:
        for entry in entries:
            try:
                recordings = source.load(entry, findings)
            except UserError as error:
                findings.add(entry.name, "dropped", str(error))
                continue
            except (OSError, ValueError, LookupError) as error:
                findings.add(entry.name, "dropped", f"cannot be read: {error}")
                continue
            for recording in recordings:
                num_rows = convert(
                    recording, writer, for_training=for_training, law=law, findings=findings
                )
                if num_rows and recording.attributes:
                    attributes[recording.name] = recording.attributes
        rows = writer.close() if writer.num_rows else None
    if rows is not None:
        size = location.filesystem.get_file_info(location.file(file)).size
        entry_text = json.dumps(manifest_entry(file, size, rows.num_rows, checked=True))
    else:
        rows, entry_text = pa.table({}), "null"
    notes = json.dumps([f.to_dict() for f in findings])
    rows = rows.replace_schema_metadata(
        {"findings": notes, "shard": entry_text, "attributes": json.dumps(attributes)}
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, rows.schema) as stream:
        stream.write_table(rows)
    location.child(WORK_FOLDER).write_bytes(receipt_name(number), sink.getvalue().to_pybytes())
    return rows.num_rows


def map_tasks(
    function: Callable[..., Any], arguments: list[tuple[Any, ...]], what: str = "shards"
) -> Iterable[Any]:
    """Apply a function to argument tuples as Ray tasks of one CPU each, in order, with progress.

    No more tasks are under way than the cluster can soon run.  Those of an interrupted job end
    with its connection to the cluster; cancelling them first may abort the process inside Ray.
    """
    import ray

    remote = ray.remote(num_cpus=1)(function)
    in_flight: dict[Any, int] = {}
    results: dict[int, Any] = {}
    waiting = list(enumerate(arguments))[::-1]
    limit = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
    next_result = 0
    terminal = sys.stderr.isatty()
    bar = tqdm(total=len(arguments), desc=what, unit="shard", mininterval=0.5 if terminal else 10)
    try:
        while waiting or in_flight:
            while waiting and len(in_flight) < limit:
                number, values = waiting.pop()
                in_flight[remote.remote(*values)] = number
            ready, _ = ray.wait(list(in_flight), timeout=1.0)
            for reference in ready:
                results[in_flight.pop(reference)] = ray.get(reference)
                bar.update()
            while next_result in results:
                yield results.pop(next_result)
                next_result += 1
    finally:
        bar.close()


def format_report(findings: Iterable[Finding]) -> str:
    """Lay out all anomalies as one table, dropped ones first."""
    order = {"dropped": 0, "repaired": 1, "kept": 2}
    ordered = sorted(findings, key=lambda f: (order[f.action], f.sequence))
    if not ordered:
        return "No anomalies."
    rows = [("what", "sequence", "frames", "why")]
    for finding in ordered[:_MAX_TABLE_ROWS]:
        numbers = ", ".join(map(str, finding.frames[:4]))
        more = f", ... ({len(finding.frames)})" if len(finding.frames) > 4 else ""
        rows.append((finding.action, finding.sequence or "(all)", numbers + more, finding.why))
    widths = [max(len(row[c]) for row in rows) for c in range(3)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)).rstrip()
        for row in rows
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    if len(ordered) > _MAX_TABLE_ROWS:
        lines.append(f"... and {len(ordered) - _MAX_TABLE_ROWS} more, all of them in {REPORT}")
    return "\n".join(lines)


def read_report(uri: str) -> list[Finding]:
    """Read the anomalies saved beside the shards; none where the report is gone."""
    location, shape = storage.locate(uri), {"findings": [Finding]}
    try:
        content = read_json_at(location, REPORT, "delete it", shape=shape)
    except FileNotFoundError:
        log.warning("%s is missing in %s; what was odd is not known any more.", REPORT, uri)
        return []
    return [_finding(values) for values in content["findings"]]


def _finding(values: dict[str, Any]) -> Finding:
    return Finding(**(values | {"frames": tuple(values.get("frames", ()))}))


def _describe_plan(
    source: RawDataset, info: dict[str, Any], entries: list[Entry]
) -> dict[str, Any]:
    """Describe what is being made, so that a resumed run can tell whether it is the same."""
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(json.dumps([entry.name, entry.values], default=str).encode())
    options = {
        f.name: str(getattr(source, f.name))
        for f in dataclasses.fields(source)
        if f.name not in ("source", "include_list")
    }
    dataset = next(k for k, v in DATASETS.items() if v is type(source))
    return {
        "dataset": dataset,
        "info": info,
        "options": options,
        "num_entries": len(entries),
        "entries": digest.hexdigest(),
    }


def _check_plan(location: storage.Location, work: storage.Location, plan: dict[str, Any]) -> None:
    if not work.exists(_PLAN):
        foreign = [n for n in location.names() if n.startswith("shard-")]
        if foreign:
            raise UserError(
                f"{location.uri} has shards ({foreign[0]}, ...) of another dataset; give another "
                "--output, or run reindex there if only the index is lost."
            )
        work.write_bytes(_PLAN, json.dumps(plan).encode())
        return
    if read_json_at(work, _PLAN, "delete that folder and ingest again") != plan:
        raise UserError(
            f"{location.uri} has the unfinished ingest of another dataset or of other options; "
            "give another --output, or delete that folder."
        )
    if location.is_local:  # what an earlier run was writing when it was stopped
        for name in location.names():
            if name.startswith(".part-shard-"):
                location.delete(name)


def _already_there(location: storage.Location, plan: dict[str, Any]) -> Ingested:
    index = FrameIndex.open(location.uri)
    made_as = index.manifest.get("plan")
    info: dict[str, Any] = plan["info"]
    other = {key for key, value in info.items() if index.manifest.get(key) != value}
    if other or (made_as is not None and made_as != plan):
        raise UserError(
            f"{location.uri} already holds {index.name} {index.split}, made of other files or with "
            "other options; give another --output, or delete that folder."
        )
    location.delete_folder(WORK_FOLDER)  # of a run that was stopped after its last file
    log.info("The dataset is already there; nothing to do.")
    return Ingested(index=index, findings=read_report(location.uri))


def _read_receipt(work: storage.Location, name: str) -> tuple[pa.Table, dict[str, Any]]:
    """Return the rows of a shard, and its findings, attributes and entry for the manifest.

    Raises:
        UserError: if the receipt is damaged.
    """
    where, remedy = f"{name} in {work.uri}", "delete it and run the same command again"
    try:
        table = pa.ipc.open_file(pa.py_buffer(work.read_bytes(name))).read_all()
        table.validate(full=True)
    except pa.ArrowException as error:
        raise UserError(f"{where} is damaged ({error}); {remedy}.") from error
    metadata = table.schema.metadata or {}
    notes = {
        key: parse_json(metadata.get(key.encode(), b""), f"{where}, {key},", remedy, shape=shape)
        for key, shape in _RECEIPT_SHAPE.items()
    }
    return table, notes


def _finish(
    location: storage.Location,
    info: dict[str, Any],
    num_shards: int,
    findings: Findings,
    plan: dict[str, Any],
    given_attributes: dict[str, list[str]],
) -> Ingested:
    """Read all receipts, write the report and, last, the index."""
    work = location.child(WORK_FOLDER)
    entries, tables = [], []
    attributes: dict[str, list[str]] = {}
    for number in range(num_shards):
        table, notes = _read_receipt(work, receipt_name(number))
        for values in notes["findings"]:
            found = _finding(values)
            findings.add(found.sequence, found.action, found.why, found.frames)
        attributes |= notes["attributes"]
        if notes["shard"]:
            entries.append(notes["shard"])
            tables.append(table)
    names = {name for table in tables for name in table.column("sequence").unique().to_pylist()}
    for sequence, wanted in given_attributes.items():
        if sequence in names:
            attributes[sequence] = [*attributes.get(sequence, ()), *wanted]
        else:
            findings.add(sequence, "dropped", "has attributes, but there is no such sequence")
    found_all = list(findings)
    report = {
        "name": info["name"],
        "split": info["split"],
        "num_frames": sum(t.num_rows for t in tables),
        "findings": [f.to_dict() for f in found_all],
    }
    location.write_bytes(REPORT, json.dumps(report, indent=1).encode())
    if not tables:
        location.delete_folder(WORK_FOLDER)
        log.info(format_report(found_all))
        raise UserError(
            f"Nothing usable is left of {info['name']} {info['split']}; the table above and "
            f"{REPORT} in {location.uri} say why."
        )
    about = {"plan": plan, "attributes": by_attribute(attributes)}
    index = index_shards(location, info | about, entries, tables)
    location.delete_folder(WORK_FOLDER)
    return Ingested(index=index, findings=found_all)
