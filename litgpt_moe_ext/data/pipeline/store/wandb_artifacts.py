"""Prepared corpora as W&B artifacts: logging one, and downloading one. Needs neither torch nor LitGPT."""

import os
import re
from pathlib import Path

from litgpt_moe_ext.data.pipeline.store.finished import MANIFEST, read_manifest
from litgpt_moe_ext.errors import SettingsError

ARTIFACT_TYPE = "dataset"
_REFERENCE = re.compile(r"[^/:\s]+/[^/:\s]+/[^/:\s]+:[^/:\s]+")
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")


def check_reference(reference: str) -> None:
    """Raise SettingsError unless a reference names an artifact in full."""
    if _REFERENCE.fullmatch(reference) is None:
        raise SettingsError(
            f"wandb_dataset: {reference!r} must name an artifact in full; write entity/project/name:alias, for example "
            "my-team/my-project/tinystories:latest"
        )


def download(reference: str, artifacts_dir: Path) -> Path:
    """Download an artifact and return its folder, `<artifacts_dir>/<name>-<version>`.

    Raises:
        SettingsError: There is no key, no network, no such artifact, or it holds no corpus.
    """
    import wandb

    if (mode := os.environ.get("WANDB_MODE", "online")) != "online":
        raise SettingsError(
            f"wandb_dataset: {reference!r} cannot be downloaded while WANDB_MODE is {mode}; unset WANDB_MODE, or train "
            "from a local copy with litgpt_moe_ext.data.PreparedCorpus"
        )
    try:
        if wandb.run is not None:
            artifact = wandb.run.use_artifact(reference, type=ARTIFACT_TYPE)
        else:
            artifact = wandb.Api().artifact(reference, type=ARTIFACT_TYPE)
        # Not artifact.name, which ends in the requested alias: `latest` will be another version some day.
        name = f"{artifact.name.partition(':')[0]}-{artifact.version}"
        directory = Path(artifact.download(root=str(artifacts_dir / name)))
    except Exception as error:  # errors from wandb's own process have no public base class
        raise SettingsError(
            f"wandb_dataset: {reference!r} cannot be downloaded ({error}); log in with `wandb login` or set "
            "WANDB_API_KEY, and check the reference (entity/project/name:alias), your access to it, and the network"
        ) from error
    if read_manifest(directory) is None:
        raise SettingsError(
            f"wandb_dataset: {reference!r} has no {MANIFEST}, so it is not a prepared corpus; log one with a script of "
            "data_prep/ and --log-to-wandb"
        )
    return directory


def check_artifact_name(name: str | None) -> None:
    """Raise SettingsError unless W&B accepts the name."""
    if name is None or _NAME.fullmatch(name) is None:
        raise SettingsError(
            f"wandb_artifact: {name!r} must be a name of an artifact; give one of letters, digits, '.', '_' and '-'"
        )


def log_corpus(directory: Path, name: str, project: str | None = None) -> str:
    """Log a finished corpus as an artifact in a run of its own.

    Args:
        directory: The corpus.
        name: Name of the artifact.
        project: W&B project; None takes WANDB_PROJECT or W&B's default.

    Returns:
        A message for the user: where the artifact is, or how to upload it if it was logged offline.

    Raises:
        SettingsError: The name is wrong, or W&B cannot be reached.
    """
    import wandb

    check_artifact_name(name)
    manifest = read_manifest(directory)
    try:
        # Otherwise `init` would return the process's existing run, and this would end it.
        with wandb.init(project=project, job_type="data_prep", reinit="create_new") as run:
            artifact = wandb.Artifact(name, type=ARTIFACT_TYPE, metadata=manifest)
            artifact.add_dir(str(directory))
            run.log_artifact(artifact)
            if run.offline:
                return f"Logged {name} offline. To upload it: wandb sync {Path(run.dir).parent}"
            artifact.wait()
            return f"Logged {run.entity}/{run.project}/{artifact.name}"
    except Exception as error:  # as in `download`
        raise SettingsError(
            f"log_to_wandb: the corpus in {directory} is finished, but logging it failed ({error}); log in with "
            "`wandb login` or set WANDB_API_KEY, or set WANDB_MODE=offline to upload it later"
        ) from error
