"""`litgpt-moe experts`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from litgpt_moe_ext.field_types import PositiveInt
from litgpt_moe_ext.wording import counted

if TYPE_CHECKING:
    from litgpt import Tokenizer

    from litgpt_moe_ext.inspect.texts import EncodedDocument


@dataclass(frozen=True)
class Experts:
    """Report what the experts of a checkpoint do with a text: an HTML page, pictures and JSON.

    Attributes:
        checkpoint_dir: A checkpoint with MoE layers, this package's or LitGPT's LLaMAMoE.
        text: Text files to read.
        data: In place of text: a token shard, or a folder of them (a prepared corpus), whose validation part is read.
        compare_with: Another checkpoint with the same tokenizer and layers, to compare their routing.
        out_dir: Where the results go. Default: `experts` in the checkpoint's directory.
        language: How tokens are classified; auto is python where most of the text is Python.
        max_tokens: Maximum number of tokens to read.
        batch_size: Sequences per forward pass.
        device: Where to run, for example cuda. Default: a GPU if there is one.
    """

    checkpoint_dir: Path
    text: list[Path] | None = None
    data: Path | None = None
    compare_with: Path | None = None
    out_dir: Path | None = None
    language: Literal["auto", "python", "text"] = "auto"
    max_tokens: PositiveInt = 100_000
    batch_size: PositiveInt = 8
    device: str | None = None

    def run(self) -> None:
        """Write the report."""
        from litgpt_moe_ext.inspect.texts import require_one_source

        require_one_source(self.text, self.data)
        from litgpt import Config

        from litgpt_moe_ext.cli.output import progress
        from litgpt_moe_ext.cli.paths import check_path
        from litgpt_moe_ext.evaluation.loading import check_checkpoint_dir, choose_device, load_model, load_tokenizer
        from litgpt_moe_ext.host.checkpoints import CONFIG_FILE
        from litgpt_moe_ext.inspect.experts import analysis as expert_analysis
        from litgpt_moe_ext.inspect.experts.capture import record_routing

        directories = {"checkpoint_dir": self.checkpoint_dir}
        if self.compare_with is not None:
            directories["compare_with"] = self.compare_with
        for name, directory in directories.items():
            check_checkpoint_dir(directory, name)
        check_path("out_dir", self._pages())
        tokenizers = [load_tokenizer(directory, name) for name, directory in directories.items()]
        expert_analysis.require_same_tokenizer([*directories.values()], tokenizers)
        documents, source = self._documents(tokenizers[0])
        language, classified = expert_analysis.classify(documents, self.language)
        target = choose_device(self.device)
        layers = []
        with progress("Routing", len(classified.ids_N) * len(directories)) as advance:
            for name, directory in directories.items():
                model = load_model(directory, target, setting=name)
                layers.append(record_routing(model, [d.ids for d in documents], self.batch_size, advance))
        analysis: dict[str, Any] = {
            "checkpoint": str(self.checkpoint_dir),
            "mlp_class_name": Config.from_file(self.checkpoint_dir / CONFIG_FILE).mlp_class_name,
            "source": source,
            "language": language,
            **expert_analysis.analyse(layers[0], classified, tokenizers[0]),
        }
        if self.compare_with is not None:
            comparison = expert_analysis.compare(*layers)
            analysis["comparison"] = {"checkpoint": str(self.compare_with), "layers": comparison}
        self._write(analysis)

    def _documents(self, tokenizer: "Tokenizer") -> "tuple[list[EncodedDocument], str]":
        from litgpt_moe_ext.inspect import texts

        if self.data is None:
            paths = self.text or []
            documents, source = texts.read_files(paths), ", ".join(map(str, paths))
        else:
            # A few tokens more than are read, because texts are encoded anew.
            tokens, source = texts.open_tokens(self.data, tokenizer)[: 2 * self.max_tokens], str(self.data)
            documents = texts.shard_documents(tokens, tokenizer, source)
        return texts.encode(documents, tokenizer, self.max_tokens), source

    def _pages(self) -> Path:
        return self.out_dir or self.checkpoint_dir / "experts"

    def _write(self, analysis: Mapping[str, Any]) -> None:
        from litgpt_moe_ext.cli.output import print_table, write_bytes, write_json, write_text
        from litgpt_moe_ext.inspect.experts import report
        from litgpt_moe_ext.pictures.style import png

        out_dir = self._pages()
        images = {name: png(figure) for name, figure in report.make_figures(analysis).items()}
        for name, image in images.items():
            write_bytes(out_dir / f"{name}.png", image)
        write_json(out_dir / "experts.json", analysis)
        write_text(out_dir / "report.html", report.make_page(analysis, images))
        columns = ("layer", "MaxVio", "dead", "load entropy", "router entropy", "class information")
        numbers = ("load_entropy", "router_entropy", "class_information")
        rows = [
            (str(layer["layer"]), _number(layer["max_vio"]), str(layer["dead_experts"]),
             *(_number(layer[name]) for name in numbers))
            for layer in analysis["layers"]
        ]  # fmt: skip
        print_table(
            f"{counted(analysis['tokens'], 'token')} of {analysis['source']}, as {analysis['language']}", columns, rows
        )
        if analysis["warning"]:
            print(f"note: {analysis['warning']}")
        print(f"Report: {out_dir / 'report.html'}; pictures and experts.json beside it")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
