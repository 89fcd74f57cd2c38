"""The registered form of a tracker: MLflow stores this file inside the model and runs it there.

It may import nothing but the pinned requirements and ``lorat``, whose modules lie beside it in
the model.  The weights are safetensors; nothing is pickled.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel


class VideoTracker(PythonModel):
    """Track one object through a video.

    Input: ``frames``, uint8 RGB (n, height, width, 3), and ``box``, float64 (4,): the object in
    the first frame, in pixels.  The parameter ``box_form`` says whether that is ``xyxy`` (x1, y1,
    x2, y2; the default) or ``ltwh`` (left, top, width, height).  Output: one row per frame with
    the box as x1, y1, x2, y2 and a score in [0, 1]; the first row is the given box.
    """

    _skip_type_hint_validation = True
    """MLflow would take type hints of ``predict`` for a schema, which only rows can have."""

    def load_context(self, context: Any) -> None:
        """Build the network from the bundle in the model's artefacts."""
        from lorat.checkpoint.folder import load_merged
        from lorat.tracking.tracker import Tracker

        self._tracker = Tracker(load_merged(context.artifacts["bundle"]))

    def predict(self, context, model_input, params=None):
        """Return columns x1, y1, x2, y2 and score, one row per frame."""
        from lorat.errors import UserError
        from lorat.image.boxes import xyxy_from_xywh

        frames = np.asarray(model_input["frames"], dtype=np.uint8)
        given = np.asarray(model_input["box"], dtype=np.float64).reshape(-1)
        form = (params or {}).get("box_form", "xyxy")
        if form not in {"xyxy", "ltwh"}:
            raise UserError(f"The box_form is {form!r}; give xyxy or ltwh.")
        box = (given if form == "xyxy" else xyxy_from_xywh(given)).tolist()
        targets = self._tracker.start([frames[0]], [box])
        rows = [[*box, 1.0]]
        for frame in frames[1:]:
            boxes, scores = self._tracker.step(targets, [frame])
            rows.append([*boxes[0], scores[0]])
        return pd.DataFrame(rows, columns=["x1", "y1", "x2", "y2", "score"], dtype="float64")


set_model(VideoTracker())
