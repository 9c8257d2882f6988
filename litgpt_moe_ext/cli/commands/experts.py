"""`litgpt-moe experts`."""

from pathlib import Path
from typing import Literal


def experts(
    checkpoint_dir: Path,
    text: Path | list[Path] | None = None,
    data: Path | None = None,
    compare_with: Path | None = None,
    out_dir: Path | None = None,
    language: Literal["auto", "python", "text"] = "auto",
    max_tokens: int = 100_000,
    batch_size: int = 8,
    device: str | None = None,
) -> None:
    """What the experts of a checkpoint do with a text: an HTML report, pictures and JSON.

    Args:
        checkpoint_dir: A checkpoint with SharedExpertMoE, NoisyTopKMoE or LLaMAMoE layers.
        text: A text file to read, or several as a list: `--text '[a.txt, b.txt]'`.
        data: In place of text: a token shard, or the folder of a prepared corpus, whose validation part is read.
        compare_with: Another checkpoint with the same tokenizer and layers, to see how far they route alike.
        out_dir: Where the results go. Default: `experts` in the checkpoint's directory.
        language: How tokens are classified; auto is python where all texts are Python.
        max_tokens: Read at most this many tokens.
        batch_size: Sequences per forward pass.
        device: Where to run, for example cuda. Default: a GPU if there is one.
    """
    for name, value in (("max_tokens", max_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}: {value} must be at least 1")
    if (text is None) == (data is None):
        raise ValueError("text, data: give exactly one of --text FILE and --data SHARD")
    paths = [text] if isinstance(text, Path) else text
    import litgpt_moe_ext
    from litgpt_moe_ext.cli.commands.output import print_table, progress, write_json, write_text

    litgpt_moe_ext.register()
    import torch

    from litgpt_moe_ext.evaluation.loading import check_checkpoint_dir, choose_device, load_model, load_tokenizer
    from litgpt_moe_ext.inspect import texts
    from litgpt_moe_ext.inspect.experts import analysis as expert_analysis
    from litgpt_moe_ext.inspect.experts import report as expert_report
    from litgpt_moe_ext.inspect.experts.capture import record_routing

    directories = [checkpoint_dir] if compare_with is None else [checkpoint_dir, compare_with]
    for directory in directories:
        check_checkpoint_dir(directory)
    tokenizers = [load_tokenizer(directory) for directory in directories]
    if compare_with is not None:
        expert_analysis.require_same_tokenizer(checkpoint_dir, compare_with, tuple(tokenizers))
    if text is not None:
        documents, source = texts.read_files(paths), ", ".join(str(path) for path in paths)
    else:
        # A few tokens more than are read, because texts are encoded anew.
        tokens, source = texts.open_tokens(data)[: 2 * max_tokens], str(data)
        documents = texts.shard_documents(tokens, tokenizers[0], source)
    encoded = texts.encode(documents, tokenizers[0], max_tokens)
    language, classes_N, class_names = expert_analysis.classify(encoded, language)
    ids = [document.ids for document in encoded]
    ids_N = torch.tensor([token for document in ids for token in document])

    target = choose_device(device)
    layers = []
    with progress("Routing", len(ids_N) * len(directories)) as advance:
        for directory in directories:
            layers.append(record_routing(load_model(directory, target), ids, batch_size, advance))
    analysis = {
        "checkpoint": str(checkpoint_dir),
        "mlp_class_name": _mlp_class_name(checkpoint_dir),
        "source": source,
        "language": language,
        **expert_analysis.analyse(layers[0], ids_N, classes_N, class_names, tokenizers[0]),
    }
    if compare_with is not None:
        comparison = expert_analysis.compare(*layers)
        analysis["comparison"] = {"checkpoint": str(compare_with), "layers": comparison}

    out_dir = out_dir or checkpoint_dir / "experts"
    out_dir.mkdir(parents=True, exist_ok=True)
    made = expert_report.make_figures(analysis)
    expert_report.write_pictures(made, out_dir)
    write_json(out_dir / "experts.json", analysis)
    write_text(out_dir / "report.html", expert_report.make_page(analysis, made))
    columns = ("layer", "MaxVio", "dead", "load entropy", "router entropy", "class information")
    print_table(
        f"{len(ids_N):,} tokens of {source}, as {language}",
        columns,
        [
            (str(layer["layer"]), _number(layer["max_vio"]), str(layer["dead_experts"]), _number(layer["load_entropy"]),
             _number(layer["router_entropy"]), _number(layer["class_information"]))
            for layer in analysis["layers"]
        ],
    )  # fmt: skip
    print(f"Report: {out_dir / 'report.html'}; pictures and experts.json beside it")


def _mlp_class_name(directory: Path) -> str:
    from litgpt import Config

    return Config.from_file(directory / "model_config.yaml").mlp_class_name


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
