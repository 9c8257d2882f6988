"""Opening LitGPT checkpoint directories; the only module that reads a `lit_model.pth` for inference.

Checkpoints are not trusted: reading one never runs code that is in it.
"""

from pathlib import Path
from typing import Any

import torch
from lightning import Fabric
from litgpt import GPT, Tokenizer

from litgpt_moe_ext.errors import SettingsError, undecoded, which_checkpoint
from litgpt_moe_ext.files.archives import COPY_AGAIN, open_archive, shortened
from litgpt_moe_ext.files.checksums import problem_with_storages
from litgpt_moe_ext.host.checkpoints import CONFIG_FILE, WEIGHTS_FILE, read_config
from litgpt_moe_ext.kernels.gpu import defect
from litgpt_moe_ext.wording import quoted

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model")


def check_checkpoint_dir(checkpoint_dir: Path, setting: str = "checkpoint_dir") -> None:
    """Check that a directory holds what `litgpt pretrain` writes: weights, model configuration and tokenizer.

    Args:
        checkpoint_dir: The directory.
        setting: Name of its setting, for errors.

    Raises:
        SettingsError: If the directory or one of its files is missing; the message names them and a remedy.
    """
    if not checkpoint_dir.is_dir():
        raise SettingsError(
            f"{setting}: {quoted(checkpoint_dir)} is not a directory. Name the folder that holds {WEIGHTS_FILE}, "
            "or get a published model with `litgpt download` first."
        )
    missing = [name for name in (WEIGHTS_FILE, CONFIG_FILE) if not (checkpoint_dir / name).is_file()]
    if missing:
        hint = which_checkpoint(checkpoint_dir, WEIGHTS_FILE)
        raise SettingsError(f"{setting}: {quoted(checkpoint_dir)} has no {' and no '.join(missing)}{hint}")
    if not any((checkpoint_dir / name).is_file() for name in VOCABULARY_FILES):
        raise SettingsError(
            f"{setting}: {quoted(checkpoint_dir)} has no tokenizer ({' or '.join(VOCABULARY_FILES)}). Copy the "
            "tokenizer's files of the training data there; `litgpt pretrain --tokenizer_dir ...` does so by itself."
        )


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Turn the `dtype` setting into a floating point type.

    Args:
        dtype: A torch type, its name ("bfloat16"), or None or "auto" for the type of the weights in the checkpoint.

    Returns:
        The type, or None for the checkpoint's.

    Raises:
        SettingsError: If it is not a floating point type that models can compute in.
    """
    if dtype is None or dtype == "auto":
        return None
    parsed = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if parsed not in _DTYPES:
        names = ", ".join(str(known).removeprefix("torch.") for known in _DTYPES)
        raise SettingsError(f"dtype: {dtype!r} must be one of {names} or auto")
    return parsed


def read_checkpoint(path: Path, setting: str = "checkpoint_dir") -> dict[str, Any]:
    """Read a `lit_model.pth`: weights, or a training checkpoint that has them under `model`.

    Args:
        path: The file.
        setting: Name of its setting, for errors.

    Returns:
        The content, with tensors on the CPU that stay on disk until they are used.

    Raises:
        SettingsError: If the file or a weight in it is damaged, or it holds Python objects other than tensors and
            plain data.
    """
    content = open_archive(path, setting)
    if damage := problem_with_storages(path, _bytes_of_weights(content.get("model", content))):
        raise SettingsError(f"{setting}: in {quoted(path.parent)} {damage}; {COPY_AGAIN}")
    return content


def load_model(
    checkpoint_dir: Path, device: torch.device, dtype: torch.dtype | None = None, setting: str = "checkpoint_dir"
) -> GPT:
    """Build the model that `model_config.yaml` describes and give it the weights of `lit_model.pth`.

    Args:
        checkpoint_dir: A directory that `check_checkpoint_dir` accepts.
        device: Where the model goes.
        dtype: Floating point type of its weights, by default the checkpoint's. Rotary tables stay float32, as in
            Hugging Face's models, and so do the values that the plugin's layers keep in float32.
        setting: Name of the directory's setting, for errors.

    Returns:
        The model, in evaluation mode and without gradients.

    Raises:
        SettingsError: If the weights cannot be read, do not fit the configuration, or are not finite.
    """
    config = read_config(checkpoint_dir, setting)
    weights_path = checkpoint_dir / WEIGHTS_FILE
    checkpoint = read_checkpoint(weights_path, setting)
    # Not on the meta device, which routers' state besides parameters and buffers could not leave.
    with Fabric(accelerator="cpu", devices=1).init_module(empty_init=True):
        model = GPT(config)
    try:
        model.load_state_dict(checkpoint.get("model", checkpoint), assign=True)
    except RuntimeError as error:
        raise SettingsError(
            f"{setting}: {weights_path} does not fit {CONFIG_FILE} beside it: {shortened(error)}"
        ) from error
    rotary_tables = model.rope_cache(device=device)
    model.cos, model.sin = rotary_tables
    model.to(device=device, dtype=dtype or model.lm_head.weight.dtype)
    model.cos, model.sin = rotary_tables
    for name, weight in model.state_dict().items():
        if not weight.isfinite().all():  # every answer would be random
            raise SettingsError(
                f"{setting}: {weights_path} has weights that are not finite in {weight.dtype} ({name}); name an "
                "earlier checkpoint, or a dtype of a larger range"
            )
    return model.requires_grad_(False).eval()


def choose_device(name: str | torch.device | None) -> torch.device:
    """Return the named device; by default a GPU if there is one, otherwise the CPU.

    Raises:
        SettingsError: If torch does not know the device, or it is not available.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise SettingsError(f"device: {name!r} must be a device of torch, such as cpu or cuda:0") from error
    if (reason := defect(device)) is not None:
        raise SettingsError(f"device: '{device}' does not work here ({reason}); leave it out, or give cpu")
    return device


def load_tokenizer(checkpoint_dir: Path, setting: str = "checkpoint_dir") -> Tokenizer:
    """Open the tokenizer of a checkpoint directory that `check_checkpoint_dir` accepts.

    Args:
        checkpoint_dir: The directory.
        setting: Name of its setting, for errors.

    Raises:
        SettingsError: If it cannot be opened.
    """
    from litgpt_moe_ext.data.tokenizer.opening import open_as_litgpt

    if remedy := undecoded(str(checkpoint_dir)):  # the tokenizers library cannot open such a path
        raise SettingsError(f"{setting}: {quoted(checkpoint_dir)} cannot be opened: {remedy}")
    try:
        return open_as_litgpt(checkpoint_dir)
    except Exception as error:  # the tokenizers library raises nothing more precise
        raise SettingsError(
            f"{setting}: the tokenizer in {checkpoint_dir} cannot be opened ({shortened(error)}); {COPY_AGAIN}"
        ) from error


def _bytes_of_weights(state: Any) -> dict[str, memoryview]:
    # Each storage once, under the name of a weight in it.
    found: dict[int, tuple[str, memoryview]] = {}
    for name, tensor in state.items() if isinstance(state, dict) else ():
        if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
            storage = tensor.untyped_storage()
            bytes_of = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
            found.setdefault(storage.data_ptr(), (str(name), bytes_of.data))
    return dict(found.values())
