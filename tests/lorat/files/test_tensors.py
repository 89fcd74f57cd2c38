"""Files of tensors: whole or not there, whatever the disk says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from lorat.files.tensors import read_safetensors, write_tensors

ROOT = Path(__file__).parents[3]


def test_a_full_disk_is_an_os_error_and_keeps_the_old_file(tmp_path: Path) -> None:
    """A child whose files may not grow beyond 4 KB writes as on a full disk."""
    path = tmp_path / "weights.safetensors"
    write_tensors({"a": torch.ones(3)}, path)
    code = f"""if True:
        import errno, resource, signal
        from pathlib import Path
        import torch
        from lorat.files.tensors import write_tensors
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            write_tensors({{"a": torch.ones(100_000)}}, Path({str(path)!r}))
        except OSError as error:
            print(errno.errorcode[error.errno], error.filename, error.strerror)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"EFBIG {path} File too large"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert torch.equal(read_safetensors(path)["a"], torch.ones(3))
