"""Data modules over the corpora of `litgpt_moe_ext.data.pipeline.corpora`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tokenizers import Tokenizer

from litgpt_moe_ext.data.modules.packed import PackedCorpus
from litgpt_moe_ext.data.pipeline import corpora
from litgpt_moe_ext.data.pipeline.tokenizer_files import read_tokenizer


@dataclass(kw_only=True)
class TextModule(PackedCorpus):
    """What a text corpus needs to be trained on. A subclass is also one of `data.pipeline.corpora`."""

    packing: Literal["stream", "best_fit", "pad"] = "stream"
    """How documents fill the windows: one after the other and cut where a window ends; whole, as many as fit, and
    padding that the loss leaves out; one a window, and padding."""
    shuffle: bool = True
    """Whether the windows come in a random order, or in that of the documents."""

    def planned_vocabulary(self) -> tuple[str, int] | None:
        """See `PackedCorpus.planned_vocabulary`."""
        if self.bpe is not None:
            return f"data.bpe.vocab_size={self.bpe.vocab_size}", self.bpe.vocab_size
        if self.tokenizer_dir is not None:
            tokenizer = Tokenizer.from_buffer(read_tokenizer(self.tokenizer_dir)["tokenizer.json"])
            return f"data.tokenizer_dir={str(self.tokenizer_dir)!r}", tokenizer.get_vocab_size()
        return None

    def prepare_corpus(self, verbose: bool) -> Path:
        """See `litgpt_moe_ext.data.pipeline.corpora.TextSettings.prepare`."""
        return self.prepare(verbose, self.tokenizer)


@dataclass(kw_only=True)
class TextCorpus(corpora.TextCorpus, TextModule):
    """Text in files: plain text, JSON lines, lists of JSON objects, parquet, each also as `.gz` or in a tar archive.

    A plain text file is one document, unless a separator is given.
    """


@dataclass(kw_only=True)
class CodeParrot(corpora.CodeParrot, TextModule):
    """CodeParrot-clean: Python files from GitHub in 54 gzipped shards of JSON lines.

    From a folder with ``file-000000000001.json.gz`` to ``..54.json.gz`` (or some of them; the last validates, as in the
    original), or without one through the Hugging Face library, which needs a network or a filled cache.
    """


@dataclass(kw_only=True)
class TinyStories(corpora.TinyStories, TextModule):
    """TinyStories in any of its forms: parquet, the archive or folder of JSON lists, or two text files.

    | what is at `source_path`                                  | validates                    |
    | --------------------------------------------------------- | ---------------------------- |
    | ``train-*.parquet``, ``validation-*.parquet``             | ``validation-*``             |
    | ``TinyStories_all_data.tar.gz``, or its ``data*.json``    | the first, ``data00.json``   |
    | ``*train*.txt``, ``*valid*.txt`` with ``<|endoftext|>``   | ``*valid*.txt``              |
    """


@dataclass(kw_only=True)
class HubDataset(corpora.HubDataset, TextModule):
    """A data set of the Hugging Face hub, or a local folder that its library can load.

    The ``datasets`` library downloads and caches it, or, with `streaming`, names the files to read over the network.
    Without a network (``HF_HUB_OFFLINE=1``) its cache or a local folder works.
    """
