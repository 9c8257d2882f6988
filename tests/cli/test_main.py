"""The command `litgpt-moe`: help without heavy imports, errors in one line."""

import subprocess
import sys
from pathlib import Path

import pytest

from litgpt_moe_ext.cli.main import COMMANDS, main

ROOT = Path(__file__).resolve().parents[2]


def test_help_names_every_command_and_loads_no_torch():
    code = (
        "import sys; from litgpt_moe_ext.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as exit: status = exit.code\n"
        "heavy = {'torch', 'lightning', 'transformers', 'litgpt', 'matplotlib', 'lm_eval'} & set(sys.modules)\n"
        "assert status == 0 and not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert result.returncode == 0, result.stderr
    assert all(name in result.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_setting_of_a_command_is_explained(name, capsys):
    with pytest.raises(SystemExit) as exit:
        main([name, "--help"])
    assert exit.value.code == 0
    from litgpt_moe_ext.cli.main import build_parser

    subparser = build_parser()._subcommands_action._name_parser_map[name]
    for action in subparser._actions:
        assert action.help, f"{name}: {action.dest} has no help"


def test_errors_are_one_line(tmp_path, capsys):
    assert main(["model-card", str(tmp_path / "nothing.yaml")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "nothing.yaml" in error
    assert error.count("\n") == 1
