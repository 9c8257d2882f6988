"""Encoding documents in several processes, in order."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import BaseContext
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer

from litgpt_moe_ext.data.tokenizer.threads import threads_for_tokenizers
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.interruption import uninterrupted

if TYPE_CHECKING:
    from litgpt_moe_ext.data.pipeline.batches import Batch

_WAITING_PER_WORKER = 3  # enough to keep workers busy, few enough to save memory


@dataclass(frozen=True, slots=True)
class Encoder:
    """Turns documents into tokens.

    Attributes:
        tokenizer_json: The tokenizer, as set up by `open_for_documents`.
        eos_id: Token after each document.
        bos_id: Token before each document, or None.
        dtype: Integer type of the tokens.
    """

    tokenizer_json: str
    eos_id: int
    bos_id: int | None
    dtype: np.dtype

    def open(self) -> Callable[[list[str]], np.ndarray]:
        """Return the function that encodes documents to token ids of shape (N,)."""
        tokenizer = Tokenizer.from_str(self.tokenizer_json)
        tokenizer.encode_special_tokens = True  # not part of the JSON
        added = tokenizer.get_added_tokens_decoder()
        # Some tokenizers do not mark these as special; their text inside a document would end it.
        tokenizer.add_special_tokens([added[number] for number in (self.eos_id, self.bos_id) if number in added])
        return partial(self._encode, tokenizer)

    def _encode(self, tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
        start = [] if self.bos_id is None else [self.bos_id]
        pieces = [np.empty(0, self.dtype)]
        with threads_for_tokenizers():
            for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
                pieces.append(np.array([*start, *encoding.ids, self.eos_id], dtype=self.dtype))
        tokens = np.concatenate(pieces)
        for border in {self.eos_id} if self.bos_id is None else {self.eos_id, self.bos_id}:
            if np.count_nonzero(tokens == border) != len(texts) * (2 if self.bos_id == self.eos_id else 1):
                self._refuse(tokenizer, texts, pieces[1:], border)
        return tokens

    def _refuse(self, tokenizer: Tokenizer, texts: list[str], pieces: list[np.ndarray], border: int) -> None:
        inside = slice(0 if self.bos_id is None else 1, -1)
        text = next(text for text, ids in zip(texts, pieces, strict=True) if border in ids[inside])
        token, does = tokenizer.id_to_token(border), "ends" if border == self.eos_id else "begins"
        raise SettingsError(
            f"tokenizer_dir: text in the document that begins with {text[:40]!r} is token {token!r} to this tokenizer, "
            f"which {does} documents; take {token} out of the documents, or use another tokenizer"
        )


def encode_in_order(
    encoder: Encoder, batches: "Iterable[Batch]", workers: int
) -> "Iterator[tuple[Batch, tuple[np.ndarray, ...]]]":
    """Yield each batch with its encoded texts, an array for each side, in order.

    Args:
        encoder: The encoder.
        batches: The batches, read ahead far enough to keep the workers busy.
        workers: Number of processes; with 1, this process encodes, with the threads of the tokenizers library.

    Raises:
        SettingsError: A worker died.
    """
    if workers == 1:
        encode = encoder.open()
        for batch in batches:
            yield batch, tuple(encode(texts) for texts in batch.texts.values())
        return
    pool = ProcessPoolExecutor(workers, _context(), _start_worker, (encoder,))
    waiting: deque = deque()
    try:
        for batch in batches:
            with uninterrupted():  # a process still starting when this one ends would print an error
                waiting.append((batch, pool.submit(_encode, tuple(batch.texts.values()))))
            if len(waiting) >= _WAITING_PER_WORKER * workers:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    except BrokenProcessPool as error:
        raise SettingsError(
            f"workers: one of {workers} processes that encode text died, perhaps for lack of memory; set workers to "
            f"less than {workers} and run again, what is done is kept"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _context() -> BaseContext:
    # Neither start method inherits threads or CUDA from this process.
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # imported once, not by every worker
    # Ctrl-C goes to every process of a terminal, and the server would print a traceback. The server and the workers
    # inherit the blocked signal; the tracker, which the server needs, unblocks it when it starts.
    resource_tracker.ensure_running()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    return context


_encode_texts: Callable[[list[str]], np.ndarray]


def _start_worker(encoder: Encoder) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes are enough
    global _encode_texts
    _encode_texts = encoder.open()


def _end_with_parent() -> None:
    # A killed parent cannot end its workers, which would wait for work forever.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(lists: tuple[list[str], ...]) -> tuple[np.ndarray, ...]:
    return tuple(_encode_texts(texts) for texts in lists)
