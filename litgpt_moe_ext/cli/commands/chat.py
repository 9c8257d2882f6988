"""`litgpt-moe chat`."""

import contextlib
import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.field_types import Fraction, NonNegativeFloat, NonNegativeInt, PositiveInt
from litgpt_moe_ext.interruption import count_again

if TYPE_CHECKING:
    from litgpt import GPT, Tokenizer
    from rich.console import Console

    from litgpt_moe_ext.evaluation.sampling import Sampling

# Colours of rich, in an order in which neighbours differ. Experts beyond their number get them with a decoration.
COLORS = ("cyan", "yellow", "magenta", "green", "red", "blue", "bright_cyan", "bright_yellow", "bright_magenta",
          "bright_green", "bright_red", "bright_blue", "white", "orange3", "purple", "dark_cyan")  # fmt: skip
DECORATIONS = ("", "underline ", "reverse ", "reverse underline ")
# Control characters, which a terminal would obey, are shown as Unicode's pictures of them.
_PICTURES = {
    **{code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"},
    127: 0x2421,
    **dict.fromkeys(range(128, 160), 0xFFFD),
}
# A character has at most four bytes, each of which may be a token.
_MAX_PENDING = 4


@dataclass(frozen=True)
class Chat:
    """Continue what you type, token by token; optionally coloured by the experts that wrote each token.

    Ctrl-C stops an answer and asks for the next text; at the prompt it ends the program.

    Attributes:
        checkpoint_dir: A LitGPT checkpoint.
        prompt: Continue this text and end. Default: ask for texts until an empty line or Ctrl-D.
        max_new_tokens: Maximum number of tokens to write. The model's context may end it earlier, unless it has a
            streaming cache.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_k: Choose among this many likeliest tokens only; null: all.
        top_p: Choose among the likeliest tokens that together have this probability.
        show_experts: Colour each token by the expert with the highest gate value of one layer.
        layer: Which MoE layer that is, counted from 0 among the MoE layers. Default: the middle one.
        seed: Seed of the random choice. Default: different each time.
        device: Where to run, for example cuda. Default: a GPU if there is one.
    """

    checkpoint_dir: Path
    prompt: str | None = None
    max_new_tokens: PositiveInt = 128
    temperature: NonNegativeFloat = 0.8
    top_k: PositiveInt | None = 50
    top_p: Fraction = 1.0
    show_experts: bool = False
    layer: NonNegativeInt | None = None
    seed: NonNegativeInt | None = None
    device: str | None = None

    def run(self) -> None:
        """Write the continuation of the prompt, or of what the user types."""
        import torch
        from rich.console import Console

        from litgpt_moe_ext.evaluation.loading import check_checkpoint_dir, choose_device, load_model, load_tokenizer
        from litgpt_moe_ext.evaluation.sampling import Sampling
        from litgpt_moe_ext.evaluation.tokenization import encoder

        if self.layer is not None and not self.show_experts:
            raise SettingsError(
                f"layer: {self.layer} is for --show_experts, which is not given; add it, or leave this out"
            )
        if self.prompt is None and sys.stdin is None:
            raise SettingsError("prompt: must be given, --prompt TEXT, where no standard input has texts")
        sampling = Sampling(self.temperature, self.top_k, self.top_p)
        check_checkpoint_dir(self.checkpoint_dir)
        tokenizer = load_tokenizer(self.checkpoint_dir)
        model = load_model(self.checkpoint_dir, choose_device(self.device))
        layer = _check_layer(model, self.layer) if self.show_experts else None
        if self.seed is not None:
            torch.manual_seed(self.seed)
        console = Console(highlight=False, soft_wrap=True)
        writer = _Writer(console, tokenizer, layer)
        encode = encoder(tokenizer)

        def answer(text: str) -> None:
            writer.write(model, encode(text), self.max_new_tokens, sampling)

        if self.prompt is not None:
            answer(self.prompt)
        else:
            _converse(console, answer)


def _converse(console: "Console", answer: Callable[[str], None]) -> None:
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  lets `input` edit lines and remember them
        console.print("[dim]Type a text to continue. Ctrl-C stops an answer; an empty line or Ctrl-D ends.[/]")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    while text := _ask():
        count_again()
        try:
            answer(text)
        except KeyboardInterrupt:
            console.print("[dim] (stopped)[/]")
        except SettingsError as error:
            console.print(f"error: {error}", style="red", markup=False)


def _check_layer(model: "GPT", layer: int | None) -> int:
    from litgpt_moe_ext.inspect.experts.capture import RoutingRecorder

    count = len(RoutingRecorder(model).layers)
    if layer is None:
        return count // 2
    if layer >= count:
        raise SettingsError(f"layer: {layer} must be from 0 to {count - 1}; the model has {count} MoE layers")
    return layer


def _ask() -> str:
    try:
        return input("\n> " if sys.stdin.isatty() else "")
    except EOFError:
        print()
        return ""
    except KeyboardInterrupt:
        print()
        raise


def style_of(expert: int) -> str:
    """Return the style, as rich reads it, in which tokens of an expert are printed."""
    decoration, color = divmod(expert, len(COLORS))
    return DECORATIONS[decoration % len(DECORATIONS)] + COLORS[color]


class TextPieces:
    """Turns tokens into text as they come.

    A token may be a part of a character, so it is held back until the character is whole. Only the last tokens are
    decoded each time, together with those of the piece before, which tell whether a blank belongs between the two.

    Args:
        decode: Turns a list of token ids into text.
        before: Token ids of the prompt.
    """

    def __init__(self, decode: Callable[[list[int]], str], before: list[int]) -> None:
        self._decode = decode
        self._before = before[-_MAX_PENDING:]
        self._pending: list[int] = []

    def add(self, token: int) -> str:
        """Return what can be printed after another token; may be empty."""
        self._pending.append(token)
        text = self._decode(self._before + self._pending)
        if text.endswith("\ufffd") and len(self._pending) < _MAX_PENDING:
            return ""
        return self.rest()

    def rest(self) -> str:
        """Return what has been held back."""
        if not self._pending:
            return ""
        known = len(self._decode(self._before)) if self._before else 0
        text = self._decode(self._before + self._pending)[known:]
        # What is not a character by itself could become one with the next token, and the count above be wrong.
        self._before, self._pending = [] if text.endswith("\ufffd") else self._pending, []
        return text


class _Writer:
    """Prints tokens as they come, coloured by their expert in MoE layer `layer` unless that is None."""

    def __init__(self, console: "Console", tokenizer: "Tokenizer", layer: int | None) -> None:
        self._console, self._tokenizer, self._layer = console, tokenizer, layer

    def write(self, model: "GPT", prompt: list[int], max_new_tokens: int, sampling: "Sampling") -> None:
        from litgpt_moe_ext.evaluation.streaming import stream
        from litgpt_moe_ext.inspect.experts.streaming import with_experts

        pieces, style = TextPieces(self._tokenizer.processor.decode, prompt), None
        used: dict[int, int] = {}
        with contextlib.closing(stream(model, prompt, max_new_tokens, sampling)) as tokens:
            if self._layer is None:
                written = ((token, None) for token in tokens)
            else:
                written = ((token.id, token.experts[self._layer][0]) for token in with_experts(model, tokens))
            for token, expert in written:
                if token == self._tokenizer.eos_id:
                    break
                if expert is not None:
                    used[expert] = used.get(expert, 0) + 1
                    style = style_of(expert)
                self._print(pieces.add(token), style)
        self._print(pieces.rest(), style)
        self._console.print()
        if used:
            legend = "  ".join(f"[{style_of(e)}]expert {e}[/]: {n}" for e, n in sorted(used.items()))
            self._console.print(f"[dim]first choice in MoE layer {self._layer}, tokens[/]  {legend}")

    def _print(self, text: str, style: str | None) -> None:
        from rich.segment import Segment, Segments
        from rich.style import Style

        # As a segment, because text would have its tabs expanded as if every piece began a line, its [markup] obeyed
        # and its :names: replaced by emoji.
        if text:
            self._console.print(Segments([Segment(text.translate(_PICTURES), Style.parse(style or ""))]))
