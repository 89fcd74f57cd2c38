"""What infra/gpu_check.sh cannot do itself: time the start of a training, and print the table.

python infra/gpu_check.py tenth-step FILE COMMAND...     seconds until the tenth step, as JSON
python infra/gpu_check.py table FOLDER                   the figures of a folder as one table
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorat.config.json_files import write_json

TENTH = re.compile(r"^step +10/")
"""The line of a training's tenth step."""
WANTED = {
    "train-B": "53 ms", "train-L": "150 ms", "track-B": "600; 3,000 together", "track-L": "350",
    "start-cold": "100 s", "start-warm": "60 s",
}  # fmt: skip
STOPPING_S = 30.0
"""How long a training may take to stop once it is asked to."""


def tenth_step(command: Sequence[str]) -> dict[str, float]:
    """Run a training until it says its tenth step, then stop it.

    Its lines are printed with their seconds.

    Returns:
        Seconds from the start, and the longest time without a line meanwhile.

    Raises:
        SystemExit: if the training ends before.
    """
    began = last = time.monotonic()
    silence = 0.0
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            now = time.monotonic()
            silence, last = max(silence, now - last), now
            print(f"{now - began:7.1f}  {line.rstrip()}", flush=True)
            if TENTH.match(line):
                break
        else:
            sys.exit(f"The training ended with {process.wait()} before its tenth step.")
        process.send_signal(signal.SIGINT)
        try:
            process.communicate(timeout=STOPPING_S)
        except subprocess.TimeoutExpired:
            process.kill()
    return {"seconds": last - began, "longest_silence_s": silence}


def table(folder: Path) -> tuple[str, bool]:
    """Return the table of a folder, and whether every step that was taken did its work."""
    steps = [line.split("\t") for line in (folder / "steps.tsv").read_text().splitlines()]
    ended = {name: (code, seconds) for name, code, seconds in steps}
    reports: dict[str, dict[str, Any]] = {
        name: json.loads((folder / f"{name}.json").read_text())
        for name, (code, _) in ended.items()
        if code == "0" and (folder / f"{name}.json").is_file()
    }
    about = next((r for r in reports.values() if "device" in r), {"device": "?", "date": "?"})
    lines = [f"| on {about['device']}, {about['date'][:10]} | measured | wanted |", "|---|---|---|"]
    for name, (code, seconds) in sorted(ended.items(), key=lambda item: _place(item[0])):
        if name.startswith("compile") or name == "shards":
            measured = "done" if code == "0" else ""
        elif name in reports:
            measured = _measured(name, reports[name])
        else:
            measured = _last_line(folder / f"{name}.log") if code == "0" else ""
        if code != "0":
            why = {"124": f"not done within {seconds} s", "untried": "no time was left"}.get(code)
            measured = why or f"failed with {code}: see {name}.log"
        lines.append(f"| {_title(name, reports)} | {measured} | {WANTED.get(name, '')} |")
    return "\n".join(lines), all(code == "0" for code, _ in ended.values())


def _place(name: str) -> tuple[int, str]:
    order = ("train", "memory", "track", "start", "tests")
    kind = name.split("-")[0]
    return (order.index(kind) if kind in order else len(order), name)


def _title(name: str, reports: dict[str, dict[str, Any]]) -> str:
    options = reports.get(name, {}).get("options")
    if options is None:
        return name
    if name.startswith("track"):
        return f"{name}: {options['variant']}, {options['width']}x{options['height']}"
    return f"{name}: {options['variant']}, {options['batch_size']} pairs, {options['precision']}"


def _measured(name: str, report: dict[str, Any]) -> str:
    """Return the figures of one step in words."""
    if name.startswith("start"):
        return (
            f"tenth step after {report['seconds']:.1f} s, at most "
            f"{report['longest_silence_s']:.1f} s without a line"
        )
    figures, options = report["figures"], report["options"]
    if name.startswith("memory"):
        peak = figures.get("lora_peak_mb")
        parts = [] if peak is None else [f"peak {peak:,.0f} MB"]
        return ", ".join([*parts, f"optimiser {figures['lora_optimiser_mb']:.1f} MB"])
    if name.startswith("train"):
        loop_ms = figures["loop_ms"]
        mfu = figures["mfu"]
        return (
            f"{loop_ms:.1f} ms a step, {1e3 * options['batch_size'] / loop_ms:,.0f} pairs/s, "
            + (f"MFU {100 * mfu:.0f} %, " if mfu is not None else "")
            + f"bare {figures['bare_ms']:.1f} ms ({100 * figures['overhead']:+.1f} %), "
            f"augmentation {figures['augment_ms']:.1f} ms"
        )
    kinds = [kind for kind in ("eager", "captured") if f"{kind}_1_fps" in figures]
    texts = []
    for num in dict.fromkeys((1, options["batch"])):
        speeds = ", ".join(f"{figures[f'{kind}_{num}_fps']:,.0f} {kind}" for kind in kinds)
        stages = " + ".join(
            f"{stage.replace('_', ' ')} {figures[f'{kinds[-1]}_{num}_{stage}_ms']:.2f}"
            for stage in ("crop", "copy", "network", "read_back")
        )
        texts.append(f"{num} video{'s' * (num > 1)}: {speeds} frames/s ({stages} ms)")
    return "; ".join(texts)


def _last_line(log: Path) -> str:
    lines = [line.strip("= ") for line in log.read_text(errors="replace").splitlines() if line]
    return lines[-1] if lines else ""


def main() -> int:
    """Do what the command line says."""
    what, *given = sys.argv[1:] or [""]
    if what == "tenth-step" and len(given) > 1:
        write_json(tenth_step(given[1:]), Path(given[0]))
        return 0
    if what == "table" and len(given) == 1:
        text, whole = table(Path(given[0]))
        print(text)
        return 0 if whole else 1
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
