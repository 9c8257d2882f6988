"""One tokenizer for all corpora of a mixture: the first corpus', which also encodes the others."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from litgpt.tokenizer import Tokenizer

from litgpt_moe_ext.data.modules.base import is_first_rank, naming
from litgpt_moe_ext.data.modules.corpus import CorpusModule
from litgpt_moe_ext.data.pipeline.store.finished import TOKENIZER_DIR
from litgpt_moe_ext.data.tokenizer.bpe import BPESettings
from litgpt_moe_ext.data.tokenizer.opening import open_as_litgpt, parse_tokenizer
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.wording import quoted


class SharedTokenizer:
    """Prepares corpora with one tokenizer, and refuses corpora with another.

    Args:
        corpora: The data modules by name. Ready-made tokens, such as `TokenShards`, have no tokenizer to compare; only
            their vocabulary size is compared.

    Attributes:
        directory: Directory of the tokenizer; None before `prepare`, or if no corpus has one.
    """

    def __init__(self, corpora: Mapping[str, Any]) -> None:
        self._corpora = corpora
        self._owner = ""
        self._is_done = False
        self.directory: Path | None = None

    def prepare(self, tokenizer: Tokenizer | None) -> None:
        """Prepare the corpora that are not prepared yet.

        Args:
            tokenizer: The run's tokenizer, or None.

        Raises:
            SettingsError: They do not fit together, or one of them cannot be prepared.
        """
        if self._is_done:
            return
        self.look_ahead(tokenizer)
        for name, module in self._corpora.items():
            with naming(name, module):
                if isinstance(module, CorpusModule):
                    tokenizer = self._prepare(name, module, tokenizer)
                module.prepare_data()
        self._compare_facts()
        self._is_done = True

    def _prepare(self, name: str, module: CorpusModule, tokenizer: Tokenizer | None) -> Tokenizer:
        """Prepare a corpus, and return the tokenizer for the next one."""
        module.tokenizer = tokenizer
        self._refuse_others(name, module, tokenizer)
        if module.corpus_path is None:
            module.corpus_path = module.prepare(is_first_rank(), tokenizer)
        directory = module.corpus_path / TOKENIZER_DIR
        if self.directory is None:
            self.directory, self._owner = directory, name
        else:
            self._compare(f"data.corpora.{name}", (directory / "tokenizer.json").read_bytes())
        return tokenizer or open_as_litgpt(directory)

    def look_ahead(self, tokenizer: Tokenizer | None) -> None:
        """Refuse wrong settings before the first corpus is encoded, which may take hours.

        Args:
            tokenizer: The run's tokenizer, or None.

        Raises:
            SettingsError: A folder is missing, or a corpus other than the first trains a tokenizer.
        """
        first = ""
        for name, module in self._corpora.items():
            if not isinstance(module, CorpusModule):
                continue
            first = first or name
            if module.corpus_path is not None or not hasattr(module, "choose_tokenizer"):
                continue
            for setting in ("source_path", "val_path"):
                path = getattr(module, setting, None)
                if path is not None and not path.exists():
                    raise SettingsError(
                        f"data.corpora.{name}.{setting}: {quoted(path)} does not exist; set it to a file or a folder"
                    )
            names_one = getattr(module, "tokenizer_dir", None) is not None or getattr(module, "bpe", True) is not None
            with naming(name, module):
                if name != first and names_one and isinstance(module.choose_tokenizer(tokenizer), BPESettings):
                    raise SettingsError(
                        f"data.corpora.{name}: {type(module).__name__} trains a tokenizer of its own here, and a "
                        f"mixture has one, that of {first}; {self._remedy(name, first)}"
                    )

    def _remedy(self, name: str, first: str) -> str:
        """Return how a corpus that trains a tokenizer can stand beside the first one."""
        if hasattr(self._corpora[name], "bpe"):
            return f"leave bpe out to use that one, or put {name} first"
        if hasattr(self._corpora[first], "bpe"):
            return f"put {name} first, and leave bpe and tokenizer_dir out of {first}"
        # Neither can do without a tokenizer of its own.
        return "read the files of one of the two with TextCorpus (pattern: '**/*.py'), which can use the other's"

    def _refuse_others(self, name: str, module: CorpusModule, tokenizer: Tokenizer | None) -> None:
        """Refuse a corpus whose settings name another tokenizer, before its documents are encoded."""
        if self.directory is None or module.corpus_path is not None or not hasattr(module, "choose_tokenizer"):
            return
        chosen = module.choose_tokenizer(tokenizer)
        if not isinstance(chosen, BPESettings):  # `look_ahead` has refused those
            self._compare(f"data.corpora.{name}.tokenizer_dir", chosen["tokenizer.json"])

    def _compare(self, setting: str, content: bytes) -> None:
        assert self.directory is not None
        first = self.directory / "tokenizer.json"
        ours = parse_tokenizer(first.read_bytes(), str(first)).to_str()
        if parse_tokenizer(content, f"tokenizer.json of {setting}").to_str() != ours:
            raise SettingsError(
                f"{setting}: is not the tokenizer of {self._owner}, so the same ids would mean other text; prepare "
                f"both with {self.directory}"
            )

    def _compare_facts(self) -> None:
        facts = {name: _facts(module) for name, module in self._corpora.items()}
        for fact, remedy in (
            ("vocabulary", "prepare all corpora with one tokenizer"),
            ("end of text", "name the same eos_token in the tokenizers' tokenizer_config.json"),
            ("beginning of text", "set prepend_bos alike in all corpora"),
        ):
            known = {name: found[fact] for name, found in facts.items() if fact in found}
            first = next(iter(known), "")
            for name, value in known.items():
                if value != known[first]:
                    raise SettingsError(
                        f"data.corpora.{name}: has {fact} {value} where {first} has {known[first]}; {remedy}"
                    )


def _facts(module: Any) -> dict[str, int | None]:
    """Return what is known about the token ids of a prepared corpus."""
    if isinstance(module, CorpusModule):
        ids = {"end of text": module.manifest["eos_id"], "beginning of text": module.manifest["bos_id"]}
        return {"vocabulary": module.manifest["vocab_size"], **ids}
    size = getattr(module, "vocab_size", None)
    return {} if size is None else {"vocabulary": size}
