"""The scripts of data_prep/: options that are those of the data modules, help at once, errors in a line, W&B."""

import json
import re
import runpy
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from litgpt.tokenizer import Tokenizer

import litgpt_moe_ext.data
from litgpt_moe_ext.data.command_line import TRAINING_ONLY
from litgpt_moe_ext.data.pipeline.store.finished import read_manifest
from litgpt_moe_ext.data.tokenizer.bpe import BPESettings, train_bpe
from tests.data.test_text import gpt2_files, tiny_txt
from tests.runs import run_command

FOLDER = Path(__file__).parents[2] / "data_prep"
SCRIPTS = sorted(FOLDER.glob("*.py"))
# The others prepare a corpus.
CORPORA = [script for script in SCRIPTS if script.stem != "tokenizer"]


def main_of(script: Path):
    return runpy.run_path(str(script))["main"]


@pytest.mark.parametrize("script", CORPORA, ids=lambda path: path.stem)
def test_options_are_the_settings_of_the_class(script, capsys):
    """Each field but those of training, with the documentation and the default of the field."""
    main = main_of(script)
    corpus = litgpt_moe_ext.data.corpus_named(*main.args)
    assert issubclass(getattr(litgpt_moe_ext.data, corpus.__name__), corpus)
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for field in fields(corpus):
        described = re.search(rf"--{field.name} (?:\{{.*?\}}|[A-Z_0-9]+) (\S.*?\((?:type: |required))", shown)
        assert (described is None) == (field.name in TRAINING_ONLY), field.name
        assert described is None or len(described[1]) > 15, f"{field.name} has no documentation"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_help_needs_no_torch(script):
    program = (
        f"import sys, runpy; sys.argv = ['x', '--help']\n"
        f"try:\n    runpy.run_path({str(script)!r}, run_name='__main__')\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "assert not {'torch', 'litgpt', 'wandb'} & set(sys.modules)"
    )
    assert "_path" in run_command(sys.executable, "-c", program).stdout


def test_a_script_prepares_what_training_finds(tmp_path, capsys):
    data = tiny_txt(tmp_path)
    arguments = ["--source_path", str(tmp_path), "--data-path", str(tmp_path / "cache"), "--bpe.vocab_size=300"]
    main_of(FOLDER / "tinystories.py")([*arguments, "--bpe.special_tokens", '["</s>"]'])
    directory = Path(capsys.readouterr().out.splitlines()[-1].removeprefix("tokenizer_dir for LitGPT: "))
    assert data.prepare_tokenizer() == directory
    assert "Reusing the corpus" in capsys.readouterr().out


def test_parquet_of_fineweb(tmp_path, capsys):
    from tests.data.test_text import TRAIN, write_parquet

    write_parquet(tmp_path / "000_00000.parquet", TRAIN)
    arguments = ["--source_path", str(tmp_path), "--data_path", str(tmp_path / "c"), "--bpe.vocab_size", "300"]
    main_of(FOLDER / "fineweb.py")([*arguments, "--val_fraction", "0.3"])
    directory = Path(capsys.readouterr().out.splitlines()[-1].removeprefix("tokenizer_dir for LitGPT: "))
    assert read_manifest(directory.parent)["documents_val"] > 5


def test_a_tokenizer_directory_of_gpt2s_files(tmp_path, capsys):
    """The tokenizer_config.json of the hub names no end-of-text token; what is made of the two files does."""
    source, out_dir = gpt2_files(tmp_path / "gpt2"), tmp_path / "tokenizers" / "gpt2"
    arguments = ["--source_path", str(source), "--out_dir", str(out_dir)]
    main_of(FOLDER / "tokenizer.py")(arguments)
    last = len(json.loads((source / "vocab.json").read_text())) - 1
    assert f"tokenizer_dir for LitGPT: {out_dir} (end of text: {last})" in capsys.readouterr().out
    tokenizer = Tokenizer(out_dir)
    assert tokenizer.eos_id == last
    assert tokenizer.decode(tokenizer.encode("Once upon a time")) == "Once upon a time"
    assert main_of(FOLDER / "tokenizer.py")(arguments) == 2
    assert capsys.readouterr().err == f"error: out_dir: '{out_dir}' exists; name a new directory\n"


def test_a_tokenizer_without_end_of_text_is_not_kept(tmp_path, capsys):
    train_bpe(["a"], BPESettings(257), tmp_path / "source")
    (tmp_path / "source" / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    arguments = ["--source_path", str(tmp_path / "source"), "--out_dir", str(tmp_path / "made")]
    assert main_of(FOLDER / "tokenizer.py")(arguments) == 2
    error = capsys.readouterr().err
    assert re.search('has no end-of-sequence token, .* add "eos_token"', error)
    assert str(tmp_path / "source") in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source_path", "nowhere", "--bpe.vocab_size", "300"], "error: source_path: 'nowhere' does not exist"),
        (["--source_path", __file__, "--bpe.vocab_size", "3"], "error: vocab_size: 3 is too small"),
        (["--source_path", "."], "error: tokenizer_dir: there is no tokenizer; set it to a folder with one, or bpe."),
        ([], "error: source_path: must be given\n"),
        (
            ["--source_path", ".", "--bpe.vocab_size", "300", "--tokenizer_dir", "data.bpe"],
            "error: tokenizer_dir: 'data.bpe' and bpe are both set",
        ),
        (["--source_pth", "."], "error: source_pth: no setting has this name; did you mean source_path?"),
        (
            ["--nonsense", "1"],
            "error: nonsense: no setting has this name; known are seed, train_count",
        ),
        (["--bpe.vocab_size", "x"], "error: bpe.vocab_size: 'x' must be an integer"),
        (["--val-fraction", "2"], "error: val_fraction: 2 must be a number of at least 0 and below 1"),
        (["--source_path", ".", "--log-to-wandb"], "error: wandb_artifact: None must be a name of an artifact"),
        (["--log_to_wandb", "--source-path", "."], "error: wandb_artifact: None must be a name of an artifact"),
        (["--source_path", ".", "--wandb-artifact", "a"], "error: wandb_artifact: 'a' has no effect; add --log-to"),
    ],
)
def test_errors_are_one_line(tmp_path, capsys, arguments, message):
    """With the exit status that a wrong setting has in every command."""
    assert main_of(FOLDER / "text_folder.py")([*arguments, "--data_path", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1


def test_nothing_is_given(capsys):
    assert main_of(FOLDER / "text_folder.py")([]) == 2
    assert capsys.readouterr().err == "error: source_path: must be given\n"


def test_the_tokenizer_script_names_its_own_option(tmp_path, capsys):
    assert main_of(FOLDER / "tokenizer.py")(["--source_path", str(tmp_path), "--out_dir", str(tmp_path / "made")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: source_path: '{tmp_path}' has no tokenizer.json")
    assert "bpe" not in error.replace("vocab.bpe", "")


def test_a_missing_option_of_the_tokenizer_script_is_one_line(capsys):
    assert main_of(FOLDER / "tokenizer.py")(["--source_path", "."]) == 2
    assert capsys.readouterr().err == "error: out_dir: must be given\n"


@pytest.mark.slow
def test_logged_offline_from_the_command_line(tmp_path):
    tiny_txt(tmp_path)
    options = {
        "--source_path": tmp_path,
        "--data_path": tmp_path / "cache",
        "--bpe.vocab_size": "300",
        "--workers": "2",
        "--wandb-artifact": "stories",
    }
    arguments = [argument for option in options.items() for argument in option]
    command = [sys.executable, FOLDER / "tinystories.py", *arguments, "--log-to-wandb"]
    result = run_command(*command, WANDB_MODE="offline", WANDB_DIR=str(tmp_path), HOME=str(tmp_path))
    line = next(line for line in result.stdout.splitlines() if line.startswith("Logged stories offline."))
    assert list(Path(line.rpartition("wandb sync ")[2]).glob("*.wandb"))
