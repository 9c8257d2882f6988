"""The Hugging Face hub: uploads of exported directories, and downloads of checkpoints to import."""

from pathlib import Path

from litgpt_moe_ext.errors import SettingsError, one_line
from litgpt_moe_ext.wording import quoted


def check_repository(repository: str) -> None:
    """Raise SettingsError unless the hub would accept an upload: checks the repository's name, network and token.

    Args:
        repository: `NAME` or `OWNER/NAME`.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise SettingsError(f"push_to_hub: {repository!r} must be NAME or OWNER/NAME; {one_line(error)}") from error
    try:
        HfApi().whoami()
    except OSError as error:  # the type of all of the hub's errors: no token, a wrong one, offline mode, no network
        raise SettingsError(
            f"push_to_hub: the login to the hub failed ({one_line(error)}); run `hf auth login`, or set HF_TOKEN"
        ) from error


def upload(directory: Path, repository: str) -> str:
    """Upload a directory, and return its address.

    Args:
        directory: The directory.
        repository: `NAME` or `OWNER/NAME`; it is created if it does not exist.

    Raises:
        SettingsError: If the hub refuses; the directory stays.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        name = api.create_repo(repository, exist_ok=True).repo_id
        return str(api.upload_folder(repo_id=name, folder_path=directory))
    except OSError as error:
        raise SettingsError(
            f"push_to_hub: {repository!r} was not uploaded ({one_line(error)}); {directory} is complete, "
            f"`hf upload {repository} {directory}` tries again"
        ) from error


def downloaded(directory: Path) -> Path:
    """Return an existing directory, or else the local copy of the repository of that name on the hub.

    Args:
        directory: The directory, or OWNER/NAME.

    Raises:
        SettingsError: If the hub has no such repository, or cannot be reached.
    """
    if directory.exists() or len(directory.parts) != 2:
        return directory
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                directory.as_posix(),  # on Windows a path has other slashes
                allow_patterns=["*.json", "model*.safetensors", "*.txt", "*.jinja", "tokenizer.model"],
                # Folders, and files of other names, hold the same weights in other forms.
                ignore_patterns=["*/*"],
            )
        )
    except (OSError, ValueError) as error:  # ValueError: no repository can have that name
        raise SettingsError(
            f"hf_dir: there is no directory {quoted(directory)}, and no such repository could be loaded from the hub "
            f"({one_line(error)})"
        ) from error
