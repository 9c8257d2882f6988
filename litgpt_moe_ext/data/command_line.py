"""The command line of the scripts in `data_prep/`: options out of a corpus' fields, errors in one line, W&B.

Options may be written with `-` or `_`; `--log-to-wandb` needs no value. Nothing here imports torch.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields

from litgpt_moe_ext.data.corpora.base import Corpus, full_docstring
from litgpt_moe_ext.data.pipeline.store import TOKENIZER_DIR
from litgpt_moe_ext.data.pipeline.wandb_artifacts import check_artifact_name, log_corpus
from litgpt_moe_ext.errors import SettingsError, exit_status

TRAINING_ONLY = frozenset({"packing", "shuffle"})


@dataclass
class Upload:
    """Whether and where to log the prepared corpus.

    Attributes:
        log_to_wandb: Log the corpus as a W&B artifact; WANDB_MODE=offline keeps it for `wandb sync`.
        wandb_artifact: Name of the artifact.
        wandb_project: W&B project of the artifact.
    """

    log_to_wandb: bool = False
    wandb_artifact: str | None = None
    wandb_project: str | None = None


def prepare_from_command_line(corpus: type[Corpus], arguments: Sequence[str] | None = None) -> int:
    """Prepare a corpus, say where its tokenizer is, and log it if asked to.

    A training run with the data module of the same name and the same settings finds the result; without this script
    it prepares it itself.

    Args:
        corpus: Its fields are the options.
        arguments: The command line without the program's name; None takes it from `sys.argv`.

    Returns:
        The exit status.
    """
    from jsonargparse import ArgumentParser

    # A name of its own: jsonargparse would look the other one up in `litgpt_moe_ext.data`, which imports torch.
    described = dataclass(type(f"{corpus.__name__}Options", (corpus,), {"__doc__": full_docstring(corpus)}))
    parser = ArgumentParser(description=(corpus.__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", action="config", help="A YAML file with options.")
    parser.add_class_arguments(described, as_positional=False, skip=set(TRAINING_ONLY))
    parser.add_class_arguments(Upload, as_positional=False)
    given = parser.instantiate_classes(
        parser.parse_args([_normalized(a) for a in (sys.argv[1:] if arguments is None else arguments)])
    )
    given.pop("config")
    upload = Upload(**{field.name: given.pop(field.name) for field in fields(Upload)})
    return exit_status(
        lambda: _prepare(corpus(**given.as_dict()), upload), interrupted="Stopped; the same command continues."
    )


def _prepare(corpus: Corpus, upload: Upload) -> None:
    if upload.log_to_wandb:
        check_artifact_name(upload.wandb_artifact)
    elif upload.wandb_artifact is not None:
        raise SettingsError(f"wandb_artifact: {upload.wandb_artifact!r} has no effect; add --log-to-wandb")
    directory = corpus.prepare()
    if upload.log_to_wandb and upload.wandb_artifact is not None:
        print(log_corpus(directory, upload.wandb_artifact, upload.wandb_project), flush=True)
    print(f"tokenizer_dir for LitGPT: {directory / TOKENIZER_DIR}", flush=True)


def _normalized(argument: str) -> str:
    if argument == "--log-to-wandb":
        return "--log_to_wandb=true"
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value if name.startswith("--") else argument
