"""`litgpt-moe chat`."""

from pathlib import Path

# Of rich; in an order in which neighbours differ.
COLORS = ("cyan", "yellow", "magenta", "green", "red", "blue", "bright_cyan", "bright_yellow", "bright_magenta",
          "bright_green", "bright_red", "bright_blue", "white", "orange3", "purple", "dark_cyan")  # fmt: skip


def chat(
    checkpoint_dir: Path,
    prompt: str | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.8,
    top_k: int | None = 50,
    top_p: float = 1.0,
    show_experts: bool = False,
    layer: int | None = None,
    seed: int | None = None,
    device: str | None = None,
) -> None:
    """Continue what you type, token by token; optionally coloured by the experts that wrote each token.

    Args:
        checkpoint_dir: A LitGPT checkpoint.
        prompt: Continue this text and end. Default: ask for texts until an empty line or Ctrl-D.
        max_new_tokens: Most tokens to write.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_k: Choose among this many likeliest tokens only; null: all.
        top_p: Choose among the likeliest tokens that together have this probability.
        show_experts: Colour each token by the expert with the highest gate value of one layer.
        layer: Which MoE layer that is, counted from 0 among the MoE layers. Default: the middle one.
        seed: Of the random choice. Default: different each time.
        device: Where to run, for example cuda. Default: a GPU if there is one.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: {max_new_tokens} must be at least 1")
    import litgpt_moe_ext

    litgpt_moe_ext.register()
    import torch
    from rich.console import Console

    from litgpt_moe_ext.evaluation.hellaswag import encoder
    from litgpt_moe_ext.evaluation.loading import check_checkpoint_dir, load_model, load_tokenizer
    from litgpt_moe_ext.evaluation.streaming import Sampling

    sampling = Sampling(temperature, top_k, top_p)
    check_checkpoint_dir(checkpoint_dir)
    tokenizer = load_tokenizer(checkpoint_dir)
    model = load_model(checkpoint_dir, torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
    if show_experts:
        layer = _check_layer(model, layer)
    if seed is not None:
        torch.manual_seed(seed)
    console = Console(highlight=False, soft_wrap=True)
    writer = _Writer(console, tokenizer, layer if show_experts else None)
    encode = encoder(tokenizer)
    if prompt is not None:
        writer.write(model, encode(prompt), max_new_tokens, sampling)
    else:
        console.print("[dim]Type a text to continue; an empty line ends.[/]")
        while text := _ask():
            writer.write(model, encode(text), max_new_tokens, sampling)


def _check_layer(model, layer: int | None) -> int:
    from litgpt_moe_ext.analysis.routing_capture import RoutingRecorder

    count = RoutingRecorder(model).layers
    if layer is None:
        return len(count) // 2
    if not 0 <= layer < len(count):
        raise ValueError(f"layer: {layer} must be from 0 to {len(count) - 1} (the model has {len(count)} MoE layers)")
    return layer


def _ask() -> str:
    try:
        return input("\n> ")
    except EOFError:
        return ""


class _Writer:
    """Prints tokens as they come.

    A token may be a part of a character, so text is decoded from all tokens so far and printed as far as it is whole.
    """

    def __init__(self, console, tokenizer, layer: int | None) -> None:
        self._console, self._tokenizer, self._layer = console, tokenizer, layer

    def write(self, model, prompt: list[int], max_new_tokens: int, sampling) -> None:
        from rich.markup import escape

        from litgpt_moe_ext.evaluation.streaming import stream

        ids: list[int] = []
        shown, used = "", {}
        for written in stream(model, prompt, max_new_tokens, sampling, self._layer is not None):
            if written.id == self._tokenizer.eos_id:
                break
            ids.append(written.id)
            text = self._tokenizer.processor.decode(ids)
            if text.endswith("\ufffd"):
                continue
            new, shown = text[len(shown) :], text
            if self._layer is None:
                self._console.print(escape(new), end="")
                continue
            expert = written.experts[self._layer][0]
            used[expert] = used.get(expert, 0) + 1
            self._console.print(escape(new), style=COLORS[expert % len(COLORS)], end="")
        self._console.print()
        if used:
            legend = "  ".join(f"[{COLORS[e % len(COLORS)]}]expert {e}: {used[e]}[/]" for e in sorted(used))
            self._console.print(f"[dim]first choice in MoE layer {self._layer}[/]  {legend}")
