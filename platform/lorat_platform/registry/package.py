"""A trained tracker as an MLflow model: safetensors, this project's code, pinned requirements."""

from __future__ import annotations

import importlib.metadata
import shutil
from pathlib import Path
from typing import Any

import numpy as np

import lorat
from lorat.checkpoint.folder import save_merged
from lorat.files.scratch import follow_umask, temporary_folder
from lorat.model.network import LoRAT

BUNDLE = "bundle"
"""Name of the folder with ``config.json`` and ``model.safetensors`` in the model's artefacts."""
LEFT_OUT = ("assets", "datasets", "__pycache__", "*.pyc", "*.md", "py.typed")
"""Parts of ``lorat`` that a registered model does not need."""
REQUIREMENTS = (
    "mlflow", "torch", "torchvision", "timm", "safetensors", "numpy", "pandas", "opencv-python",
)  # fmt: skip
"""What a registered model imports; pinned to the versions that registered it."""


def requirements() -> list[str]:
    """Return the pinned requirements of a registered model."""
    return [f"{name}=={importlib.metadata.version(name).split('+')[0]}" for name in REQUIREMENTS]


def signature() -> Any:
    """Return the documented input and output of the pyfunc model."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema, TensorSpec

    inputs = Schema(
        [
            TensorSpec(np.dtype(np.uint8), (-1, -1, -1, 3), "frames"),
            TensorSpec(np.dtype(np.float64), (4,), "box"),
        ]
    )
    outputs = Schema([ColSpec("double", name) for name in ("x1", "y1", "x2", "y2", "score")])
    params = ParamSchema([ParamSpec("box_form", "string", "xyxy")])
    return ModelSignature(inputs=inputs, outputs=outputs, params=params)


def input_example() -> dict[str, np.ndarray]:
    """Return a tiny video: a bright square that moves over a dark ground."""
    frames = np.full((3, 32, 48, 3), 40, np.uint8)
    for t, frame in enumerate(frames):
        frame[10:22, 12 + 4 * t : 24 + 4 * t] = 220
    return {"frames": frames, "box": np.array([12.0, 10.0, 24.0, 22.0])}


def package(model: LoRAT, folder: Path, *, mlflow_model: Any = None) -> None:
    """Write ``model`` as an MLflow model into ``folder``, which must not exist.

    Args:
        model: any form; its adapters are folded in.
        folder: receives ``MLmodel``, requirements, code and safetensors.
        mlflow_model: MLflow's description of a logged model to fill in.
    """
    from mlflow import pyfunc

    with temporary_folder() as scratch:
        bundle = scratch / BUNDLE
        save_merged(model, bundle)
        source = Path(lorat.__file__).parent
        code = scratch / "code" / "lorat"
        shutil.copytree(source, code, ignore=shutil.ignore_patterns(*LEFT_OUT))
        pyfunc.save_model(
            path=str(folder),
            python_model=str(Path(__file__).with_name("pyfunc_model.py")),
            artifacts={BUNDLE: str(bundle)},
            code_paths=[str(code)],
            pip_requirements=requirements(),
            signature=signature(),
            input_example=input_example(),
            mlflow_model=mlflow_model,
        )
    for cache in folder.rglob("__pycache__"):
        shutil.rmtree(cache, ignore_errors=True)
    follow_umask(folder)  # the code's files may have been installed with other modes
