"""LitGPT's own commands on checkpoints with the attention fields: all of them write the same text, beyond the context.

The models have random weights and always take the likeliest token, so that every command must write the same.
"""

import contextlib
import functools
import json
import os
import pty
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from unittest.mock import Mock

import litgpt.chat.base
import litgpt.generate.base
import litgpt.generate.sequentially
import litgpt.generate.speculative_decoding
import psutil
import pytest
import torch
from litgpt import GPT, LLM, Config

from litgpt_moe_ext.cli.main import main
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.evaluation.litgpt_evaluate import EvaluateSettings, evaluate_checkpoint
from litgpt_moe_ext.evaluation.loading import load_model, load_tokenizer
from tests.evaluation.conftest import VOCABULARY_SIZE, write_checkpoint, write_tokenizer
from tests.models import dense_config, moe_config, randomize
from tests.runs import PATIENCE
from tests.training.processes import free_port

PROMPT = "is it so? the quick brown fox"
NEW_TOKENS = 70  # more than block_size, which is 32
ENDLESS = {
    "rope_adjustments": {"factor": 4.0, "original_max_seq_len": 8, "beta_fast": 8.0, "beta_slow": 1.0},
    "sliding_window_size": 5,
    "sliding_window_indices": [1, 0],
    "norm_qk": True,
    "streaming_cache_first": 2,
    "streaming_cache_window": 20,
}
DOCUMENTS = {
    "position_embedding": "learned",
    "rotary_percentage": 0.0,
    "attention_document_boundary": "eos",
    "attention_document_token_id": 0,
    "attention_document_restart_positions": True,
    "block_size": 128,
}


def make_checkpoint(folder: Path, changes: dict) -> Path:
    config = moe_config(
        n_shared_expert=1,
        vocab_size=VOCABULARY_SIZE,
        padded_vocab_size=VOCABULARY_SIZE,
        lm_head_bias=True,
        attention_class_name="SinkAttention",
        **changes,
    )
    model = randomize(GPT(config), std=0.4)
    # Neither the end of the text nor a part of a character, which chats that decode token by token cannot print.
    tokenizer = write_tokenizer(folder)
    readable = [tokenizer.decode([i]).isascii() and tokenizer.decode([i]).isprintable() for i in range(VOCABULARY_SIZE)]
    model.lm_head.bias.data[~torch.tensor(readable)] = -1000.0
    model.lm_head.bias.data[0] = -1000.0
    write_checkpoint(folder, config, model)
    return folder


@pytest.fixture(scope="module")
def endless_dir(tmp_path_factory) -> Path:
    """Sinks, YaRN, a sliding window in the first layer, normalised queries and keys, and a streaming cache."""
    torch.manual_seed(5)
    return make_checkpoint(tmp_path_factory.mktemp("endless"), ENDLESS)


@pytest.fixture(scope="module")
def documents_dir(tmp_path_factory) -> Path:
    """Learned positions that begin again in every document."""
    torch.manual_seed(6)
    return make_checkpoint(tmp_path_factory.mktemp("documents"), DOCUMENTS)


@functools.cache
@torch.inference_mode()
def continuation(folder: Path, new_tokens: int = NEW_TOKENS) -> list[int]:
    """Return the tokens that the model writes after `PROMPT`."""
    model, tokenizer = load_model(folder, torch.device("cpu")), load_tokenizer(folder)
    ids = tokenizer.processor.encode(PROMPT).ids
    n_prompt = len(ids)
    if model.config.streaming_cache_window is None:
        for _ in range(new_tokens):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        return ids[n_prompt:]
    model.max_seq_length = n_prompt + new_tokens
    model.set_kv_cache(1)
    logits = model(torch.tensor([ids]), torch.arange(n_prompt))
    for position in range(n_prompt, n_prompt + new_tokens):
        ids.append(int(logits[0, -1].argmax()))
        logits = model(torch.tensor([ids[-1:]]), torch.tensor([position]))
    return ids[n_prompt:]


def expected_text(folder: Path, new_tokens: int = NEW_TOKENS) -> str:
    """Return the same as text."""
    return load_tokenizer(folder).processor.decode(continuation(folder, new_tokens))


FOLDERS = ["endless_dir", "documents_dir"]
GREEDY = {"top_k": 1, "max_new_tokens": NEW_TOKENS, "precision": "32-true"}


@pytest.mark.parametrize("name", FOLDERS)
def test_generate(name, request, capsys):
    folder = request.getfixturevalue(name)
    litgpt.generate.base.main(folder, PROMPT, num_samples=2, **GREEDY)
    assert capsys.readouterr().out.count(PROMPT + expected_text(folder)) == 2


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_text_beyond_the_context_is_refused_in_a_line(command, documents_dir, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda _: PROMPT)
    generate = (
        functools.partial(litgpt.generate.base.main, prompt=PROMPT) if command == "generate" else litgpt.chat.base.main
    )
    with pytest.raises(
        SettingsError, match=r"^max_seq_length: 2\d\d tokens are more than the model's block_size: 128; "
    ):
        generate(documents_dir, **{**GREEDY, "max_new_tokens": 200})


@pytest.mark.parametrize("name", FOLDERS)
def test_chat(name, request, capsys, monkeypatch):
    folder = request.getfixturevalue(name)
    lines = iter(["the", PROMPT, PROMPT, ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    litgpt.chat.base.main(folder, **GREEDY)
    replies = capsys.readouterr().out.split(">> Reply: ")[1:]
    assert len(replies) == 3
    assert replies[0].strip()
    assert replies[1].strip("\n") == replies[2].strip("\n") == expected_text(folder)


@pytest.mark.parametrize("text", ["", "the"])
def test_a_chat_ends_with_its_input(documents_dir, capsys, monkeypatch, text):
    """At Ctrl-D, or where a file has no more lines."""
    lines = iter([text] if text else [])

    def read(_: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    litgpt.chat.base.main(documents_dir, **GREEDY)
    assert capsys.readouterr().out.count(">> Reply: ") == bool(text)


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ("", {}, "prompt: '' has no tokens to continue from; give some text"),  # nothing begins a text here
        (PROMPT, {"max_new_tokens": 0}, "max_new_tokens: 0 must be at least 1"),
        (PROMPT, {"top_k": 0}, "top_k: 0 must be at least 1"),
    ],
)
def test_to_generate_nothing_is_refused_in_a_line(documents_dir, prompt, settings, message):
    with pytest.raises(SettingsError, match=f"^{message}$"):
        litgpt.generate.base.main(documents_dir, prompt, **GREEDY | settings)


def test_litgpts_own_models_end_as_without_the_plugin(tmp_path, monkeypatch):
    write_tokenizer(tmp_path)
    config = dense_config(vocab_size=VOCABULARY_SIZE, padded_vocab_size=VOCABULARY_SIZE)
    write_checkpoint(tmp_path, config, GPT(config))
    with pytest.raises(IndexError):
        litgpt.generate.base.main(tmp_path, "", max_new_tokens=2, precision="32-true")
    monkeypatch.setattr("builtins.input", Mock(side_effect=EOFError))
    with pytest.raises(EOFError):
        litgpt.chat.base.main(tmp_path, max_new_tokens=2, precision="32-true")


@pytest.mark.parametrize("name", FOLDERS)
def test_llm(name, request):
    folder = request.getfixturevalue(name)
    llm = LLM.load(folder, distribute=None)
    llm.distribute(accelerator="cpu", devices=1, precision="32-true")
    for new_tokens in (5, NEW_TOKENS, 9):  # the cache grows, and is used again
        assert llm.generate(PROMPT, max_new_tokens=new_tokens, top_k=1) == expected_text(folder, new_tokens)
    assert "".join(llm.generate(PROMPT, max_new_tokens=NEW_TOKENS, top_k=1, stream=True)) == expected_text(folder)


@pytest.mark.parametrize("name", FOLDERS)
def test_our_chat(name, request, capsys):
    folder = request.getfixturevalue(name)
    arguments = ["chat", str(folder), f"--prompt={PROMPT}", f"--max_new_tokens={NEW_TOKENS}", "--temperature=0"]
    assert main(arguments) == 0
    assert capsys.readouterr().out == expected_text(folder) + "\n"


@pytest.mark.parametrize("name", FOLDERS)
@torch.inference_mode()
def test_layers_in_sequence(name, request):
    """As `generate_sequentially` and `LLM.distribute` divide them among GPUs: the model is made without memory."""
    folder = request.getfixturevalue(name)
    with torch.device("meta"):
        model = GPT(Config.from_file(folder / "model_config.yaml"))
    model.load_state_dict(torch.load(folder / "lit_model.pth", weights_only=True), assign=True)
    prompt = torch.tensor(load_tokenizer(folder).processor.encode(PROMPT).ids)
    length = len(prompt) + NEW_TOKENS
    model = litgpt.generate.sequentially.sequential(model, torch.device("cpu"), length, devices=1)
    ids = litgpt.generate.base.generate(model, prompt, length, top_k=1)
    assert ids[len(prompt) :].tolist() == continuation(folder)


def test_speculative_decoding(endless_dir, documents_dir, capsys):
    litgpt.generate.speculative_decoding.main(documents_dir, documents_dir, PROMPT, **GREEDY)
    printed = capsys.readouterr().out
    # LitGPT 0.5.13 leaves out the first token that it generates.
    text = load_tokenizer(documents_dir).processor.decode(continuation(documents_dir)[1:-1])
    assert PROMPT + text in printed
    assert "Acceptance rate: 100.00%" in printed
    with pytest.raises(ValueError, match="streaming_cache_first and streaming_cache_window to null"):
        litgpt.generate.speculative_decoding.main(documents_dir, endless_dir, PROMPT, **GREEDY)


def test_evaluate_generates_with_a_streaming_checkpoint(endless_dir, task_file, tmp_path):
    """Texts of a batch have different lengths, which a streaming cache does not know; tasks fit into the context."""
    content = task_file.read_text()
    for old, new in {
        "multiple_choice": "generate_until",
        'doc_to_choice: [" yes", " no"]\n': "",
        "doc_to_target: answer": 'doc_to_target: "x"',
        "metric: acc": "metric: exact_match",
    }.items():
        content = content.replace(old, new)
    task_file.write_text(content + "generation_kwargs: {until: [], max_gen_toks: 8, do_sample: false}\n")
    evaluate_checkpoint(
        EvaluateSettings(endless_dir, tasks=str(task_file), out_dir=tmp_path, device="cpu", batch_size=3)
    )
    results = json.loads((tmp_path / "results.json").read_text())["results"]["yes_or_no"]
    assert results["exact_match,none"] == 0.0


def start(*arguments: str | Path, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "litgpt", *map(str, arguments)]
    # A session of its own, so that the server's workers end with it.
    return subprocess.Popen(command, text=True, start_new_session=True, stdout=subprocess.PIPE, **options)


def ask_server(port: int, process: subprocess.Popen, request: dict) -> dict:
    """Post to a server that may still be starting."""
    give_up = time.monotonic() + PATIENCE
    post = urllib.request.Request(
        f"http://127.0.0.1:{port}/predict", json.dumps(request).encode(), {"Content-Type": "application/json"}
    )
    while True:
        try:
            with urllib.request.urlopen(post, timeout=PATIENCE) as response:
                return json.loads(response.read())
        except OSError:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < give_up, "the server does not answer"
            time.sleep(0.5)


CHAT = "import sys; from litgpt_moe_ext.cli.main import main; sys.exit(main(sys.argv[1:]))"


class Terminal:
    """A program that believes to run in a terminal of 100 columns."""

    def __init__(self, *arguments: str | Path) -> None:
        self.screen = ""
        environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"}
        environment.pop("NO_COLOR", None)
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            os.execve(sys.executable, [sys.executable, *map(str, arguments)], environment)

    def expect(self, text: str) -> str:
        """Wait until `text` appears on the screen, and return what did since the last call."""
        begin, give_up = len(self.screen), time.monotonic() + PATIENCE
        while text not in self.screen[begin:]:
            assert time.monotonic() < give_up, self.screen
            self.screen += os.read(self._terminal, 4096).decode(errors="replace")
        return self.screen[begin:]

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._terminal, text.encode())

    def status(self) -> int:
        """Wait for the end and return the exit status."""
        with contextlib.suppress(OSError):  # the other side has closed it
            while piece := os.read(self._terminal, 4096):
                self.screen += piece.decode(errors="replace")
        os.close(self._terminal)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.mark.slow
def test_our_chat_in_a_terminal(endless_dir):
    arguments = ["chat", endless_dir, "--show_experts=true", "--max_new_tokens=1000000"]
    terminal = Terminal("-c", CHAT, *arguments)
    terminal.expect("> ")
    terminal.type("is it so? [bold] \u00e9\r")
    terminal.expect("\x1b[3")  # a colour
    terminal.expect("\x1b[3")
    terminal.type("\x03")
    after = terminal.expect("> ")
    assert "(stopped)" in after
    terminal.type("the\r")
    terminal.expect("\x1b[3")
    terminal.type("\x03")
    terminal.expect("> ")
    terminal.type("\x04")
    assert terminal.status() == 0
    assert "Traceback" not in terminal.screen


@pytest.mark.slow
def test_real_processes(endless_dir):
    """`litgpt generate`, `chat` with piped input, and `serve` asked twice over HTTP."""
    expected, port = expected_text(endless_dir), free_port()
    greedy = ("--top_k=1", f"--max_new_tokens={NEW_TOKENS}", "--precision=32-true")
    server = start("serve", endless_dir, *greedy, "--accelerator=cpu", f"--port={port}")
    others = []
    try:
        others.append(start("generate", endless_dir, f"--prompt={PROMPT}", *greedy))
        others.append(start("chat", endless_dir, *greedy, stdin=subprocess.PIPE))
        generated, _ = others[0].communicate(timeout=PATIENCE)
        chatted, _ = others[1].communicate(f"the\n{PROMPT}\n\n", timeout=PATIENCE)
        assert [process.returncode for process in others] == [0, 0]
        assert PROMPT + expected in generated
        assert f">> Reply: {expected}\n" in chatted
        assert ask_server(port, server, {"prompt": PROMPT}) == {"output": expected}
        assert ask_server(port, server, {"prompt": PROMPT}) == {"output": expected}
        children = psutil.Process(server.pid).children(recursive=True)
        assert children
        server.terminate()
        assert server.wait(PATIENCE) == 128 + signal.SIGTERM
        assert all(not child.is_running() or child.status() == psutil.STATUS_ZOMBIE for child in children)
    finally:
        for process in (server, *others):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
