"""`litgpt-moe perplexity`."""

from pathlib import Path


def perplexity(
    checkpoint_dir: Path,
    text: Path | list[Path] | None = None,
    data: Path | None = None,
    max_tokens: int = 1_000_000,
    batch_size: int = 8,
    device: str | None = None,
    dtype: str | None = None,
    json: Path | None = None,
) -> None:
    """Perplexity and bits per byte of a checkpoint on a text, also by position in the context.

    Args:
        checkpoint_dir: A LitGPT checkpoint.
        text: A text file to read, or several as a list: `--text '[a.txt, b.txt]'`.
        data: In place of text: a token shard, or the folder of a prepared corpus, whose validation part is read.
        max_tokens: Read at most this many tokens.
        batch_size: Windows of the model's block size per forward pass.
        device: Where to run, for example cuda. Default: a GPU if there is one.
        dtype: Floating point type of the weights. Default: that of the checkpoint.
        json: File to write the figures to.
    """
    for name, value, low in (("max_tokens", max_tokens, 2), ("batch_size", batch_size, 1)):
        if value < low:
            raise ValueError(f"{name}: {value} must be at least {low}")
    if (text is None) == (data is None):
        raise ValueError("text, data: give exactly one of --text FILE and --data SHARD")
    paths = [text] if isinstance(text, Path) else text
    import litgpt_moe_ext
    from litgpt_moe_ext.cli.commands.output import print_table, progress, write_json

    litgpt_moe_ext.register()
    import torch

    from litgpt_moe_ext.evaluation.loading import (
        check_checkpoint_dir,
        choose_device,
        load_model,
        load_tokenizer,
        parse_dtype,
    )
    from litgpt_moe_ext.evaluation.perplexity import as_tensor, bytes_of, summarize
    from litgpt_moe_ext.evaluation.scoring import token_losses
    from litgpt_moe_ext.inspect import texts

    check_checkpoint_dir(checkpoint_dir)
    parsed_dtype = parse_dtype(dtype)
    tokenizer = load_tokenizer(checkpoint_dir)
    if data is not None:
        parts = [as_tensor(texts.open_tokens(data)[:max_tokens])]
    else:
        if tokenizer.eos_id is None:
            raise ValueError(
                f"checkpoint_dir: the tokenizer of {str(checkpoint_dir)!r} has no end-of-text token to begin with"
            )
        encoded = texts.encode(texts.read_files(paths), tokenizer, max_tokens)
        # A document begins after an end-of-text token, as in training.
        parts = [torch.tensor([tokenizer.eos_id, *document.ids]) for document in encoded]
    target = choose_device(device)
    model = load_model(checkpoint_dir, target, parsed_dtype)
    highest = max(int(part.max()) for part in parts)
    if highest >= model.config.padded_vocab_size:
        raise ValueError(
            f"data: token id {highest} is outside the model's vocabulary of {model.config.padded_vocab_size}; the data "
            "was made with another tokenizer"
        )
    with progress("Scoring", sum(len(part) - 1 for part in parts)) as advance:
        scored = [token_losses(model, part, batch_size, advance) for part in parts]
    losses_N, contexts_N = (torch.cat(column) for column in zip(*scored, strict=True))
    result = summarize(losses_N, contexts_N, sum(bytes_of(part[1:].tolist(), tokenizer) for part in parts))

    print_table(
        "Loss by position",
        ("predicted from", "tokens", "loss", "perplexity"),
        [
            (f"{row['first']} to {row['last']} tokens", f"{row['tokens']:,}", f"{row['loss']:.4f}",
             f"{torch.tensor(row['loss']).exp().item():.3f}")
            for row in result.by_position
        ],
    )  # fmt: skip
    print(
        f"{result.tokens:,} tokens, {result.bytes:,} bytes: loss {result.loss:.4f}, "
        f"perplexity {result.perplexity:.3f}, {result.bits_per_byte:.4f} bits per byte"
    )
    if json is not None:
        figures = {"perplexity": result.perplexity, "bits_per_byte": result.bits_per_byte}
        write_json(json, {"checkpoint": str(checkpoint_dir), **vars(result), **figures})
