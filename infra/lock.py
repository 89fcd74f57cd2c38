"""Write requirements.lock: the exact versions of everything that pyproject.toml asks for.

``python infra/lock.py`` keeps the versions that are locked already and adds what is missing;
``--upgrade`` takes the newest that fit, ``--upgrade-package NAME`` only that package's.  Any
Python 3.11 does: pip-tools is installed in a throw-away environment.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK = "infra/requirements.lock"
PLAIN = ("header", "annotate", "emit-index-url", "emit-find-links", "emit-trusted-host")
"""What pip-compile would write beside the versions."""


def main(arguments: list[str]) -> int:
    """Run pip-compile with ``arguments`` added; return its exit code."""
    if sys.version_info[:2] != (3, 11):
        print("error: the image has Python 3.11, so lock with python3.11.", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="lock-") as folder:
        venv.create(folder, with_pip=True)
        python = f"{folder}/bin/python"
        subprocess.run([python, "-m", "pip", "install", "--quiet", "pip-tools>=7.6"], check=True)
        command = [python, "-m", "piptools", "compile", "--quiet", "--extra=dev", "--strip-extras"]
        command += [f"--no-{flag}" for flag in PLAIN]
        command += [*arguments, f"--output-file={LOCK}", "pyproject.toml"]
        subprocess.run(command, cwd=ROOT, check=True)
    lines = (ROOT / LOCK).read_text().splitlines()
    pins = [line for line in lines if "==" in line]  # drops the project itself and comments
    (ROOT / LOCK).write_text("\n".join(pins) + "\n")
    print(f"{LOCK}: {len(pins)} packages")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
