"""A LitGPT model as a model of the LM Evaluation Harness.

Truncation, prefix token, windows of rolling likelihoods and stop strings follow the conventions of lm-eval 0.4.9's
`HFLM`, so that a checkpoint and its conversion to Hugging Face's format score the same. Two things are more exact here:
log-probabilities are computed in float32 for any dtype of the weights, and a text is cut at its stop string even if the
rest of its batch went on.
"""

import sys
from collections import defaultdict
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from litgpt import GPT, Tokenizer
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.evaluation.batching import BatchSize
from litgpt_moe_ext.evaluation.decoding import supports_padded_cache
from litgpt_moe_ext.evaluation.generation import GenerationSettings, generate
from litgpt_moe_ext.evaluation.loading import (
    check_checkpoint_dir,
    choose_device,
    load_model,
    load_tokenizer,
    parse_dtype,
)
from litgpt_moe_ext.evaluation.scoring import score_batch
from litgpt_moe_ext.evaluation.tokenization import check_ids, decode, encoder

# lm-eval's request for a likelihood: (context and continuation as text, or None), and their tokens.
TokenRequest = tuple[tuple[str, str] | None, list[int], list[int]]
Answer = tuple[float, bool]

DEFAULT_MAX_GEN_TOKS = 256


class GPTModel(TemplateLM):
    """A `litgpt.GPT` in memory and its tokenizer behind lm-eval's interface.

    Args:
        model: The model, in evaluation mode.
        tokenizer: Its `litgpt.Tokenizer`.
        tokenizer_dir: The folder it was read from.
        batch_size: Requests per batch.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, tokenizer_dir: Path, batch_size: BatchSize) -> None:
        super().__init__()
        self.model = model
        self.device = next(model.parameters()).device
        # `self.tokenizer` is lm-eval's name for a Hugging Face tokenizer, which this is not.
        self._tokenizer, self._tokenizer_dir, self._batch_size = tokenizer, tokenizer_dir, batch_size

    @property
    def max_length(self) -> int:
        """Maximum number of tokens that the model reads at once: its block size."""
        return self.model.max_seq_length

    @property
    def max_gen_toks(self) -> int:
        """Tokens to generate by default: lm-eval's 256, or half the block size if that is less."""
        return DEFAULT_MAX_GEN_TOKS if self.max_length > DEFAULT_MAX_GEN_TOKS else self.max_length // 2

    @property
    def eot_token_id(self) -> int | None:  # pyrefly: ignore[bad-override]  (lm-eval copes with None)
        """Id of the end-of-text token, None if the tokenizer has none."""
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:  # pyrefly: ignore[bad-override]
        """Id of the token that replaces an empty context: beginning of sequence, else end of text."""
        bos_id = self._tokenizer.bos_id
        prefix = self.eot_token_id if bos_id is None else bos_id
        if prefix is None:
            raise SettingsError(
                "tokenizer: the task scores text without a context, which needs a first token, but the tokenizer names "
                f"neither bos_token nor eos_token; add one to {self._tokenizer_dir / 'tokenizer_config.json'}"
            )
        return prefix

    @property
    def tokenizer_name(self) -> str:
        """Key that separates cached requests of different tokenizers."""
        return str(self._tokenizer_dir)

    def get_model_info(self) -> dict[str, Any]:
        """Return facts for `results.json`, under the names that lm-eval uses for Hugging Face models."""
        return {
            "model_num_parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "model_dtype": self.model.lm_head.weight.dtype,
        }

    def tok_encode(self, string: str, **kwargs: Any) -> list[int]:
        """Tokenize without adding special tokens."""
        ids = encoder(self._tokenizer)(string)
        check_ids(self.model, ids)
        return ids

    def _decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        return decode(self._tokenizer, tokens, skip_special_tokens)

    def _progress(self, total: int, description: str, disable: bool) -> tqdm:
        return tqdm(total=total, desc=description, disable=disable or not sys.stderr.isatty())

    def _loglikelihood_tokens(
        self, requests: Sequence[TokenRequest], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[Answer]:
        """Score continuations.

        Args:
            requests: Contexts and continuations. An empty context becomes the prefix token; a context that is too long
                loses tokens on the left.
            disable_tqdm: Whether to hide the progress bar.
            kwargs: Ignored.

        Returns:
            For each request the sum of the continuation's log-probabilities in nats, and whether greedy decoding would
            give the continuation.

        Raises:
            SettingsError: If a continuation has no tokens or more than the block size.
        """
        # Continuations of one token after the same context, as in multiple choice by letter, need one forward pass.
        requests_of: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            requests_of[self._model_input(request)].append(index)
        # Longest first: running out of memory happens early, and the progress bar errs on the safe side.
        inputs = sorted(requests_of, key=lambda tokens: (-len(tokens), tokens))

        def score(batch: Sequence[tuple[int, ...]]) -> dict[int, Answer]:
            asked = [requests_of[tokens] for tokens in batch]
            found = score_batch(self.model, batch, [[requests[index][2] for index in indices] for indices in asked])
            return dict(zip(chain(*asked), chain(*found), strict=True))

        answers: dict[int, Answer] = {}
        with self._progress(len(requests), "Scoring", disable_tqdm) as bar:
            for batch_answers in self._batch_size.run(inputs, score):
                answers.update(batch_answers)
                bar.update(len(batch_answers))
        return [answers[index] for index in range(len(requests))]

    def _model_input(self, request: TokenRequest) -> tuple[int, ...]:
        text, context, continuation = request
        if not 0 < len(continuation) <= self.max_length:
            raise SettingsError(
                f"tasks: a continuation has {len(continuation)} tokens; it must have 1 to {self.max_length} (the "
                f"model's block size). The task's document gives (context, continuation) = {str(text)[:200]}"
            )
        # The last token is only predicted, never read.
        return tuple([*(context or [self.prefix_token_id]), *continuation][-(self.max_length + 1) : -1])

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts, cut into windows of the block size in which every token is predicted once.

        Args:
            requests: Instances whose only argument is a text.
            disable_tqdm: Whether to hide the progress bar.

        Returns:
            The sum of the log-probabilities of each text's tokens, in nats.
        """
        windows: list[TokenRequest] = []
        request_of_window: list[int] = []
        for index, request in enumerate(requests):
            (text,) = request.args
            tokens = self.tok_encode(text)
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                request_of_window.append(index)
        totals = [0.0] * len(requests)
        for index, (logprob, _) in zip(
            request_of_window, self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm), strict=True
        ):
            totals[index] += logprob
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue texts until a stop string, the end-of-text token or the largest number of tokens.

        Args:
            requests: Instances whose arguments are a text and the task's `generation_kwargs`. A text that leaves no
                room for `max_gen_toks` tokens loses tokens on the left.
            disable_tqdm: Whether to hide the progress bar.

        Returns:
            The continuations, without the stop string.

        Raises:
            SettingsError: If `generation_kwargs` ask for something unsupported, or for more tokens than the block size.
        """
        if not supports_padded_cache(self.model):
            print("Generating without a key/value cache, since LitGPT's cache for sliding windows takes no padding.")
        requests_of: dict[GenerationSettings, list[tuple[int, list[int]]]] = defaultdict(list)
        for index, request in enumerate(requests):
            text, generation_kwargs = request.args
            settings = GenerationSettings.parse(generation_kwargs, self.max_gen_toks)
            requests_of[settings].append((index, self._prompt(text, settings)))
        texts = [""] * len(requests)
        with self._progress(len(requests), "Generating", disable_tqdm) as bar:
            for settings, numbered_prompts in requests_of.items():
                numbered_prompts.sort(key=lambda numbered: -len(numbered[1]))
                for batch in self._batch_size.run(numbered_prompts, lambda b, s=settings: self._generate(b, s)):
                    for index, text in batch:
                        texts[index] = text
                    bar.update(len(batch))
        return texts

    def _prompt(self, text: str, settings: GenerationSettings) -> list[int]:
        room = self.max_length - settings.max_gen_toks
        if room < 1:
            raise SettingsError(
                f"generation_kwargs: max_gen_toks: {settings.max_gen_toks} leaves no room for a prompt in the model's "
                f"block size of {self.max_length}; set it to less in the task"
            )
        return (self.tok_encode(text) or [self.prefix_token_id])[-room:]

    def _generate(
        self, numbered_prompts: Sequence[tuple[int, list[int]]], settings: GenerationSettings
    ) -> list[tuple[int, str]]:
        # A stop string may be generated as other tokens than its own encoding, hence two more, as in lm-eval.
        stops = [(stop, len(self.tok_encode(stop)) + 2) for stop in settings.until if stop]

        def is_finished(tokens: list[int]) -> bool:
            return tokens[-1] == self.eot_token_id or any(
                stop in self._decode(tokens[-window:], skip_special_tokens=False) for stop, window in stops
            )

        generated = generate(self.model, [prompt for _, prompt in numbered_prompts], settings, is_finished)
        return [
            (index, self._text(tokens, settings))
            for (index, _), tokens in zip(numbered_prompts, generated, strict=True)
        ]

    def _text(self, tokens: list[int], settings: GenerationSettings) -> str:
        if tokens[-1] == self.eot_token_id:
            tokens = tokens[:-1]
        text = self._decode(tokens)
        for stop in settings.until:
            if stop:
                text = text.split(stop)[0]
        return text


class LitGPTModel(GPTModel):
    """A LitGPT checkpoint behind lm-eval's interface.

    Args:
        checkpoint_dir: Directory with `lit_model.pth` (weights, or a training checkpoint), `model_config.yaml` and
            tokenizer files.
        device: Where to run, for example "cpu" or "cuda:0"; by default a CUDA device if there is one.
        dtype: Floating point type of the weights, or its name; by default the checkpoint's.
        batch_size: Requests per batch, or "auto" for the largest power of two that fits (at most 64), or "auto:N" to
            search for it N times.

    Raises:
        SettingsError: If files are missing or damaged, a setting is malformed, or the weights do not fit the
            configuration.
    """

    def __init__(
        self,
        checkpoint_dir: Path | str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        batch_size: int | str = 1,
    ) -> None:
        checkpoint_dir = Path(checkpoint_dir)
        device = choose_device(device)
        check_checkpoint_dir(checkpoint_dir)
        dtype = parse_dtype(dtype)
        size = BatchSize.parse(batch_size, device)
        tokenizer = load_tokenizer(checkpoint_dir)
        super().__init__(load_model(checkpoint_dir, device, dtype), tokenizer, checkpoint_dir, size)
