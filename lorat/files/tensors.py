"""Files of named tensors: whole or not there, and never pickled."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from lorat.errors import UserError, cannot_read
from lorat.files.scratch import whole_file

if TYPE_CHECKING:
    from torch import Tensor


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a file of named tensors: safetensors whatever its name, or ``.pth`` without pickle code.

    Raises:
        UserError: if the file is missing, may not be read, or is neither.
    """
    import torch

    if path.suffix not in {".pth", ".pt"}:
        try:
            return _load(path)
        except OSError as error:
            raise _no_weights(path, error) from error
        except Exception as error:
            raise UserError(
                f"{path} is not a safetensors file ({error}); give one, or a .pth file."
            ) from error
    try:
        with open(path, "rb") as file:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise _no_weights(path, error) from error
    except Exception as error:
        raise UserError(
            f"{path} cannot be read with weights_only=True ({type(error).__name__}); "
            "give a file that holds tensors alone."
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    tensors = content.values() if isinstance(content, dict) else [content]
    if not isinstance(content, dict) or not all(isinstance(v, torch.Tensor) for v in tensors):
        raise UserError(f"{path} holds no dictionary of tensors; give a state dict.")
    return content


def _load(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file of any name: safetensors itself takes none that is no UTF-8.

    Raises:
        OSError: if it is missing or may not be read.
    """
    from safetensors.torch import load_file

    with open(path, "rb") as file:
        return load_file(f"/proc/self/fd/{file.fileno()}")


def _no_weights(path: Path, error: OSError) -> UserError:
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return UserError(
            f"There is no weight file {path}; give an existing .safetensors or .pth file."
        )
    return cannot_read(path, error)


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file; a reader sees the old file or the whole new one.

    Raises:
        OSError: if it cannot be written, such as on a full disk.
    """
    from safetensors.torch import save_file

    with whole_file(path) as part:
        try:
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, part)
        except SafetensorError as error:
            raise _as_os_error(error, path) from error


def _as_os_error(error: SafetensorError, path: Path) -> OSError:
    """Read the operating system's number out of safetensors' message, if it has one."""
    number = re.search(r"\(os error (\d+)\)", str(error))
    if number:
        return OSError(int(number[1]), os.strerror(int(number[1])), str(path))
    return OSError(f"{path} cannot be written: {error}")


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read a file of a checkpoint.

    Raises:
        UserError: if it is missing, damaged, or may not be read.
    """
    try:
        return _load(path)
    except FileNotFoundError as error:
        raise UserError(f"The checkpoint has no {path}; give a complete one.") from error
    except OSError as error:
        raise cannot_read(path, error) from error
    except Exception as error:  # safetensors raises a class of its own that derives from this one
        raise UserError(f"{path} is damaged ({error}); give an undamaged checkpoint.") from error
