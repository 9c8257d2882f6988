"""The command line of the scripts in `data_prep/`: options from a corpus' fields, one-line errors, W&B.

Options may be written with `-` or `_`; `--log-to-wandb` needs no value. Nothing here imports torch, or anything heavy
before Ctrl-C is handled.
"""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litgpt_moe_ext.data import corpus_named
from litgpt_moe_ext.errors import SettingsError, exit_status, one_line, refuse_first

if TYPE_CHECKING:
    from litgpt_moe_ext.data.corpora.base import Corpus

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


def prepare_from_command_line(name: str, arguments: Sequence[str] | None = None) -> int:
    """Prepare a corpus, say where its tokenizer is, and log it if asked to.

    A training run with the same data module and settings finds the result, or else prepares the corpus itself.

    Args:
        name: Name of the corpus, whose fields are the options.
        arguments: The command line without the program's name; None takes it from `sys.argv`.

    Returns:
        The exit status.
    """
    words = _normalized(sys.argv[1:] if arguments is None else arguments)

    def run() -> None:
        corpus = corpus_named(name)
        given = _parse(corpus, words)
        upload = Upload(**{field.name: given.pop(field.name) for field in fields(Upload)})
        try:
            _prepare(corpus(**given), upload)
        except SettingsError as error:
            # Unlike in a recipe, the options here have no `data.` prefix.
            options = "|".join(field.name for field in fields(corpus))
            raise SettingsError(re.sub(rf"(?<![\w./'])data\.(?=(?:{options})\b)", "", str(error))) from error

    return exit_status(run, interrupted="Stopped; the same command continues.")


def _parse(corpus: "type[Corpus]", words: Sequence[str]) -> dict[str, Any]:
    from jsonargparse import ArgumentError, ArgumentParser

    from litgpt_moe_ext.data.corpora.base import full_docstring

    # Renamed, because jsonargparse would look the original name up in `litgpt_moe_ext.data`, which imports torch.
    described = dataclass(type(f"{corpus.__name__}Options", (corpus,), {"__doc__": full_docstring(corpus)}))
    parser = ArgumentParser(description=(corpus.__doc__ or "").partition("\n")[0], exit_on_error=False)
    parser.add_argument("--config", action="config", help="A YAML file with options.")
    parser.add_class_arguments(described, as_positional=False, skip=set(TRAINING_ONLY))
    parser.add_class_arguments(Upload, as_positional=False)
    try:
        given = parser.instantiate_classes(parser.parse_args(words))
    except ArgumentError as error:
        types = {field.name: field.type for options in (corpus, Upload) for field in fields(options)}
        refuse_first(_mistakes(words, {name: kind for name, kind in types.items() if name not in TRAINING_ONLY}))
        raise SettingsError(refusal(error)) from error
    given.pop("config")
    return given.as_dict()


def refusal(error: Exception) -> str:
    """Return jsonargparse's complaint about a command line in one line, with the option's name."""
    missing = re.search(r'Key "(\S+)" is required', str(error))
    return f"{missing[1]}: must be given" if missing else f"{one_line(error)}; --help explains the options"


def _mistakes(words: Sequence[str], types: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with options that a parser has refused."""
    from litgpt_moe_ext.cli.given import Given, read_flags
    from litgpt_moe_ext.cli.mistakes import mistakes

    given = Given()
    for name, text in read_flags(words):
        if name == "config":
            given.add_recipe(Path(text))
        else:
            given.add_text(name, text, types)
    return mistakes(given.tree, types)


def _prepare(corpus: "Corpus", upload: Upload) -> None:
    from litgpt_moe_ext.data.pipeline.store.finished import TOKENIZER_DIR
    from litgpt_moe_ext.data.pipeline.store.wandb_artifacts import check_artifact_name, log_corpus

    if upload.log_to_wandb:
        check_artifact_name(upload.wandb_artifact)
    elif upload.wandb_artifact is not None:
        raise SettingsError(f"wandb_artifact: {upload.wandb_artifact!r} has no effect; add --log-to-wandb")
    directory = corpus.prepare()
    if upload.log_to_wandb and upload.wandb_artifact is not None:
        print(log_corpus(directory, upload.wandb_artifact, upload.wandb_project), flush=True)
    print(f"tokenizer_dir for LitGPT: {directory / TOKENIZER_DIR}", flush=True)


def _normalized(arguments: Sequence[str]) -> list[str]:
    words = [re.sub(r"(?<=^--)[^=]+", lambda name: name[0].replace("-", "_"), argument) for argument in arguments]
    pairs = zip(words, [*words, "--"][1:], strict=True)
    return [f"{word}=true" if word == "--log_to_wandb" and after.startswith("-") else word for word, after in pairs]
