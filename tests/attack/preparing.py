"""Preparing a corpus in small batches and shards, to its end or until it is killed."""

import multiprocessing
import os
import random
import signal
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from litgpt_moe_ext.data import corpus_named
from litgpt_moe_ext.data.corpora import documents
from litgpt_moe_ext.data.pipeline import batches
from litgpt_moe_ext.data.pipeline.settings import CorpusSettings
from tests.attack.runs import EVENTS

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["__main__", __name__])


@dataclass(frozen=True)
class Sizes:
    """What is small here, so that little text has many batches and shards.

    Attributes:
        batch: Bytes that are encoded together.
        shard: Tokens of a shard.
    """

    batch: int
    shard: int

    @classmethod
    def random(cls, chance: random.Random) -> "Sizes":
        """Return sizes of any kind."""
        return cls(chance.choice((1, 300, 5000, 100_000)), chance.choice((1, 500, 20_000)))


def prepare(settings: dict[str, Any], sizes: Sizes) -> Path:
    """Prepare a corpus of text, and return its folder."""
    small = partial(CorpusSettings, shard_tokens=sizes.shard)
    with patch.object(batches, "_BATCH_BYTES", sizes.batch), patch.object(documents, "CorpusSettings", small):
        return corpus_named("TextCorpus")(**settings).prepare(verbose=False)


def prepare_and_die(settings: dict[str, Any], sizes: Sizes, at: int) -> bool:
    """Prepare a corpus in a process that is killed before its n-th change of a file; return whether it was through."""
    process = CONTEXT.Process(target=_die, args=(settings, sizes, at))
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode == 0


def _die(settings: dict[str, Any], sizes: Sizes, at: int) -> None:
    seen, folder = 0, str(settings["data_path"])

    def count(event: str, arguments: tuple) -> None:
        nonlocal seen
        if event in EVENTS and folder in str(arguments[0]):
            seen += 1
            if seen == at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 until the end of the process
    sys.addaudithook(count)
    prepare(settings, sizes)
