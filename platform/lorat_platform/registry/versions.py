"""The model registry: versions of ``lorat``, their aliases, and getting one back as files."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from lorat import errors
from lorat.config.fields import to_dict
from lorat.config.tracking import TrackingConfig
from lorat.errors import UserError
from lorat.files import checksums
from lorat.files.home import home
from lorat.files.scratch import temporary_folder
from lorat.files.storage import Location, locate
from lorat_platform.recording.store import check_answers, connect, tracking_uri, unusable_store
from lorat_platform.runs import checkpoints

if TYPE_CHECKING:
    from lorat.model.network import LoRAT

log = logging.getLogger(__name__)

MODEL_NAME = "lorat"
CONFIG_FILE = "config.json"
CANDIDATE = "candidate"
SCORE_HISTOGRAM = "score_histogram"
"""Tag with the tracker's scores in its evaluation, counted in bins, as JSON."""
SEED_TAG = "race.seed"
"""Tag with the seed of a version whose configuration has raced with several."""
SEEDS_TAG = "race.seeds"
"""Tag with the addresses of the checkpoints of all of them, by seed, as JSON."""
CHAMPION = "champion"
MAX_DESCRIPTION = 5000
"""Characters of a version's description that every database of MLflow takes."""


def register(
    model: LoRAT,
    *,
    run_id: str,
    datasets: Mapping[str, str] | None = None,
    scores: Mapping[str, float] | None = None,
    reference_set: Sequence[str] = (),
    git_revision: str | None = None,
    tags: Mapping[str, Any] | None = None,
) -> str:
    """Register a trained model as the candidate and return its version.

    Args:
        model: any form; the registered one is merged.
        run_id: the MLflow run that trained it.
        datasets: name -> fingerprint of what it was trained on.
        scores: results of its evaluation, such as ``{"val/ao": 0.61}``.
        reference_set: URIs of the data sets that the scores are of; a candidate is compared with
            this model on them.
        git_revision: of the code that trained it.
        tags: more tags of the version.

    Raises:
        MlflowException: if MLflow does not take it; nothing is registered then.
    """
    from lorat_platform.registry.package import package

    client = connect()
    from mlflow.models import Model

    about: dict[str, str] = {"variant": model.variant.name}
    usual = to_dict(TrackingConfig())
    about |= {
        f"tracking.{key}": f"{value:g}"
        for key, value in to_dict(model.tracking).items()
        if value != usual[key]
    }
    about |= {f"dataset.{key}": value for key, value in (datasets or {}).items()}
    about |= score_tags(scores or {})
    about |= {"reference_set": json.dumps(list(reference_set))} if reference_set else {}
    about |= {"git_revision": git_revision} if git_revision else {}
    about |= {key: str(value) for key, value in (tags or {}).items()}

    run = client.get_run(run_id)
    logged = client.create_logged_model(
        run.info.experiment_id, name="model", source_run_id=run_id, tags=about, model_type="tracker"
    )
    try:
        with temporary_folder() as scratch:
            description = Model(
                artifact_path=logged.artifact_location,
                run_id=run_id,
                model_uuid=logged.model_id,
                model_id=logged.model_id,
            )
            package(model, scratch / "model", mlflow_model=description)
            client.log_model_artifacts(logged.model_id, str(scratch / "model"))
    except BaseException:
        with contextlib.suppress(Exception):  # the first error is the one to hear about
            client.finalize_logged_model(logged.model_id, "FAILED")
        raise
    client.finalize_logged_model(logged.model_id, "READY")
    from mlflow.entities import LoggedModelOutput

    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])  # on the run's page
    about["model_id"] = logged.model_id  # MLflow's own field is empty when a version is read
    ensure_registered_model(client, MODEL_NAME)
    version = client.create_model_version(
        MODEL_NAME,
        source=logged.artifact_location,
        run_id=run_id,
        tags=about,
        description=version_description(MODEL_NAME, about, scores or {})[:MAX_DESCRIPTION],
        model_id=logged.model_id,
    ).version
    client.set_registered_model_alias(MODEL_NAME, CANDIDATE, version)
    return str(version)


def score_tags(scores: Mapping[str, float]) -> dict[str, str]:
    """Return the tags of a version, and of the run that trained it, which hold its scores."""
    return {f"score.{key}": f"{value:.4f}" for key, value in scores.items()}


def add_evaluation(
    client: Any, name: str, version: str, scores: Mapping[str, float], tags: Mapping[str, str]
) -> None:
    """Give a version what its registration lacked: scores, their line, and more tags.

    What it has already stays: scores of its training, or of another evaluation.
    """
    stored = client.get_model_version(name, version)
    missing = {key: value for key, value in tags.items() if key not in stored.tags}
    if not has_scores(stored.tags):
        missing |= score_tags(scores)
        whole = ". ".join(filter(None, (headline(scores), stored.description)))
        client.update_model_version(name, version, whole[:MAX_DESCRIPTION])
    for key, value in missing.items():
        client.set_model_version_tag(name, version, key, value)
    if missing and (model_id := stored.tags.get("model_id")):
        client.set_logged_model_tags(model_id, missing)


def has_scores(tags: Mapping[str, str]) -> bool:
    """Tell whether a version with these tags was evaluated."""
    return any(key.startswith("score.") for key in tags)


def headline(scores: Mapping[str, float]) -> str:
    """Return the scores in a line, those of each data set together, such as ``AO 0.613 (val)``.

    Args:
        scores: by names that end in ``DATASET/SCORE``.
    """
    of_set: dict[str, list[str]] = {}
    for key, value in scores.items():
        dataset, _, name = key.rpartition("/")
        if name.endswith(("_low", "_high")):  # ends of an interval
            continue
        shown = f"{name.upper()} {value:.3f}"
        of_set.setdefault(dataset.rpartition("/")[2], []).append(shown)
    return "; ".join(
        f"{', '.join(shown)} ({dataset})" if dataset else ", ".join(shown)
        for dataset, shown in of_set.items()
    )


def version_description(name: str, about: Mapping[str, str], scores: Mapping[str, float]) -> str:
    """Return a version's Markdown description; lists of versions show its first line."""
    first = ". ".join(filter(None, (headline(scores), about["variant"])))
    rows = "\n".join(f"| {key} | {value} |" for key, value in sorted(about.items()))
    return (
        f"{first}. LoRAT, safetensors, no pickle.\n\n| | |\n|---|---|\n{rows}\n\n"
        "```python\n"
        "import mlflow\n"
        f'model = mlflow.pyfunc.load_model("models:/{name}@{CHAMPION}")\n'
        'table = model.predict({"frames": frames_uint8_rgb, "box": xyxy_of_first_frame})\n'
        '# or left, top, width, height: predict({...}, params={"box_form": "ltwh"})\n'
        "```\n"
    )


def ensure_registered_model(client: Any, name: str) -> None:
    """Make the registered model if it is missing; safe for many processes at once."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(
            name, description="Visual object tracker: DINOv2 adapted with LoRA."
        )
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def version_of(uri: str) -> tuple[str, str]:
    """Return name and version that ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION`` means now.

    Raises:
        UserError: if there is none, or MLflow cannot be reached.
    """
    match = re.fullmatch(r"models:/([^/@]+)(?:@([\w-]+)|/(\d+))", uri)
    if not match:
        raise UserError(f"{uri} is no model; give models:/NAME@ALIAS or models:/NAME/VERSION.")
    name, alias, number = match.groups()
    with _user_errors(uri):
        client = connect()
        if alias:
            version = client.get_model_version_by_alias(name, alias)
        else:
            version = client.get_model_version(name, number)
    return name, str(version.version)


def tags_of(name: str, version: str) -> dict[str, str]:
    """Return the tags of a version.

    Raises:
        UserError: if there is none, or MLflow cannot be reached.
    """
    with _user_errors(f"models:/{name}/{version}"):
        return dict(connect().get_model_version(name, version).tags)


def usual() -> str:
    """Return the model that is meant where none is named, and say which: champion, or candidate.

    Raises:
        UserError: if there is neither, or MLflow cannot be reached.
    """
    alias, uri = usual_alias()
    why = "" if alias == CHAMPION else f"; there is no {CHAMPION} yet"
    log.info("model       %s, the %s%s", uri, alias, why)
    return uri


def usual_alias() -> tuple[str, str]:
    """Return what is meant where no model is named: the alias, and the model that it means now.

    Raises:
        UserError: if there is neither champion nor candidate, or MLflow cannot be reached.
    """
    from mlflow.exceptions import MlflowException

    with _user_errors(f"models:/{MODEL_NAME}"):
        try:
            aliases = connect().get_registered_model(MODEL_NAME).aliases
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            aliases = {}
    for alias in (CHAMPION, CANDIDATE):
        if version := aliases.get(alias):
            return alias, f"models:/{MODEL_NAME}/{version}"
    raise UserError(
        f"There is no {MODEL_NAME}@{CHAMPION} and no {MODEL_NAME}@{CANDIDATE} in MLflow at "
        f"{tracking_uri()}; train one with jobs/train.py, or give --model."
    )


def pinned(uri: str) -> str:
    """Return an address that means the same model later too: an alias becomes its version.

    Raises:
        UserError: if there is no such alias, or MLflow cannot be reached.
    """
    if not re.fullmatch(r"models:/[^/@]+@[\w-]+", uri):
        return uri
    name, version = version_of(uri)
    return f"models:/{name}/{version}"


def registered_by(run_id: str) -> str | None:
    """Return the version that an MLflow run has registered, or none.

    What killed that run may have come before the alias was set: it is set unless a newer version
    has it.
    """
    client = connect()
    found = client.search_model_versions(f"name='{MODEL_NAME}' and run_id='{run_id}'")
    if not found:
        return None
    version = max(int(each.version) for each in found)
    aliases = client.get_registered_model(MODEL_NAME).aliases
    if int(aliases.get(CANDIDATE, 0)) < version:
        client.set_registered_model_alias(MODEL_NAME, CANDIDATE, str(version))
    return str(version)


def resolve(uri: str | os.PathLike[str]) -> Path:
    """Return the local folder (or released file) of a model.

    Args:
        uri: ``models:/NAME@ALIAS``, ``models:/NAME/VERSION``, ``models:/m-ID``,
            ``runs:/RUN_ID/model``, a checkpoint folder (also ``s3://`` or ``gs://``), a bundle, the
            folder of a downloaded MLflow model, or a released LoRAT file.  What is fetched is kept
            in the home folder.

    Raises:
        UserError: if there is no such model, or MLflow cannot be reached.
    """
    text = os.fspath(uri)
    if text.startswith(("models:/", "runs:/")):
        return _download(text)
    if "://" in text and not (location := locate(text)).is_local:
        return _download_checkpoint(location)
    path = Path(location.path if "://" in text else os.path.abspath(os.path.expanduser(text)))
    if not path.exists():
        raise UserError(
            f"There is no model {errors.named(text)}; give models:/{MODEL_NAME}@{CHAMPION}, "
            "models:/NAME/VERSION, runs:/RUN_ID/model, a checkpoint folder or a released file."
        )
    if (path / "MLmodel").exists():
        return path / "artifacts" / "bundle"
    return path


def load(uri: str | os.PathLike[str], *, variant: str | None = None) -> LoRAT:
    """Load a model from anything that :func:`resolve` takes, on the CPU.

    Args:
        uri: the model.
        variant: needed for a released file, which does not name its variant.

    Raises:
        UserError: if it is missing, damaged or of another shape.
    """
    from lorat import checkpoint

    return checkpoint.load(resolve(uri), variant=variant)


def _download(uri: str) -> Path:
    """Download the safetensors bundle of a logged model, once."""
    with _user_errors(uri):
        location = _artifact_location(uri)
    key = hashlib.sha256(f"{tracking_uri()} {location}".encode()).hexdigest()[:16]
    target = home() / "models" / key
    if _is_kept(target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    bundle = f"{location.rstrip('/')}/artifacts/bundle"
    lost = (
        f"MLflow at {tracking_uri()} lists {uri}, but its files are not at {location}, where it "
        "says; if that folder was moved, with the home folder perhaps, put a link there, else "
        "register the model again."
    )
    if urllib.parse.urlsplit(bundle).scheme in ("", "file"):
        place = Path(locate(bundle).path)
        if not place.is_dir():
            raise UserError(lost)
        for file in (place, *place.rglob("*")):
            if not os.access(file, os.R_OK):
                raise errors.cannot_read(file, PermissionError(errno.EACCES, "Permission denied"))
    with _user_errors(uri, missing=lost):
        from mlflow.artifacts import download_artifacts

        with temporary_folder(target.parent) as scratch:
            found = download_artifacts(
                artifact_uri=bundle, dst_path=str(scratch), tracking_uri=tracking_uri()
            )
            Path(found, "origin.json").write_text(json.dumps({"uri": uri, "location": location}))
            try:
                os.rename(found, target)
            except OSError:  # another process was faster
                shutil.rmtree(found)
    return target


def _is_kept(target: Path) -> bool:
    """Tell whether a model was fetched before; a damaged copy of it is removed."""
    if not (target / CONFIG_FILE).exists():
        return False
    if checksums.is_intact(target):
        return True
    log.warning("The copy of a model in %s is damaged and is fetched anew.", target)
    shutil.rmtree(target)
    return False


def _download_checkpoint(location: Location) -> Path:
    """Download a training's checkpoint from its storage, once."""
    try:
        mark = location.filesystem.get_file_info(location.file(checkpoints.MANIFEST))
        if not mark.is_file:
            raise UserError(
                f"There is no checkpoint at {location.uri}; give its folder as the end of the "
                "training names it."
            )
        key = hashlib.sha256(f"{location.uri} {mark.mtime_ns}".encode()).hexdigest()[:16]
        target = home() / "models" / key
        if _is_kept(target):
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        parent, _, name = location.path.rpartition("/")
        run = Location(location.uri, location.filesystem, parent)
        with temporary_folder(target.parent) as scratch:
            found = checkpoints.download(run, name, scratch / name)
            with contextlib.suppress(OSError):  # another process was faster
                os.rename(found, target)
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"The checkpoint {location.uri} cannot be read: {errors.reason(error)}; "
            "check the address and the connection."
        ) from error
    return target


def _artifact_location(uri: str) -> str:
    client = connect()
    if uri.startswith("runs:/"):
        run_id, _, path = uri.removeprefix("runs:/").partition("/")
        run = client.get_run(run_id)
        outputs = run.outputs.model_outputs if run.outputs else []
        models = [client.get_logged_model(output.model_id) for output in outputs]
        models = [model for model in models if not path or model.name == path]
        if not models:
            raise UserError(
                f"The run {run_id} has no model {path}; give a run that registered one."
            )
        return models[-1].artifact_location
    if re.fullmatch(r"models:/m-[0-9a-f]+", uri):
        return client.get_logged_model(uri.removeprefix("models:/")).artifact_location
    name, version = version_of(uri)
    return client.get_model_version_download_uri(name, version)


def add_to_description(client: Any, name: str, version: str, heading: str, text: str) -> None:
    """Append a section to a version's description; the oldest sections make room."""
    stored = client.get_model_version(name, version).description or ""
    first, *sections = re.split(r"\n(?=### )", stored)
    sections.append(f"### {heading}\n\n{text}")
    while len("\n".join([first, *sections])) > MAX_DESCRIPTION and len(sections) > 1:
        del sections[0]
    whole = "\n".join([first, *sections])
    client.update_model_version(name, version, whole[:MAX_DESCRIPTION])


@contextlib.contextmanager
def _user_errors(uri: str, *, missing: str = "") -> Iterator[None]:
    """Turn what MLflow says about a missing model or server into one sentence.

    Args:
        uri: of the model.
        missing: what is said of something that is not there; none means the model.
    """
    from mlflow.exceptions import MlflowException

    where = tracking_uri()
    check_answers(where)
    try:
        yield
    except MlflowException as error:
        if unusable := unusable_store(error, where):
            raise unusable from error
        if error.error_code in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}:
            raise UserError(
                missing
                or f"There is no {uri} in MLflow at {where}; its models page shows names and "
                "aliases."
            ) from error
        raise UserError(
            f"MLflow at {where} does not give {uri} ({str(error).splitlines()[0][:200]}); "
            "correct MLFLOW_TRACKING_URI or start the server."
        ) from error
