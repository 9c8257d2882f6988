"""A good guest: with the plugin installed, a model that names none of its classes behaves bit for bit as before."""

import json
import os
import subprocess
import sys
import types
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from litgpt import Config

import litgpt_moe_ext
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.host import autoload, commands
from tests.host.guest_report import CONFIGS
from tests.models import moe_config
from tests.runs import PATIENCE

HERE = Path(__file__).parents[1]


def run(arguments: list[str], disabled: bool = False, **options) -> subprocess.CompletedProcess:
    environment = {**os.environ, "LITGPT_MOE_EXT_DISABLE": "1" if disabled else "", "PYTHONPATH": ""}
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        cwd=HERE.parent,
        timeout=PATIENCE,
        **options,
    )


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    from litgpt.utils import save_config

    checkpoint = tmp_path_factory.mktemp("checkpoint")
    save_config(moe_config(attention_class_name="SinkAttention"), checkpoint)

    def report(disabled: bool) -> dict:
        result = run([str(HERE / "host" / "guest_report.py"), str(checkpoint)], disabled)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout.rpartition("REPORT")[2])

    with ThreadPoolExecutor() as pool:
        with_plugin, without_plugin = pool.map(report, [False, True])
    assert with_plugin.pop("plugin active") is True
    assert without_plugin.pop("plugin active") is False
    return with_plugin, without_plugin


@pytest.mark.parametrize("label", CONFIGS)
def test_bit_identical_with_and_without(reports, label):
    with_plugin, without_plugin = reports
    assert with_plugin[label] == without_plugin[label]
    assert with_plugin[label]["read back"] == "True"


def test_what_takes_long_to_import_is_postponed(reports):
    with_plugin, without_plugin = reports
    assert with_plugin["loaded"] == []
    # torchvision as well, with most versions of torchmetrics
    assert set(without_plugin["loaded"]) >= {"scipy", "torch._dynamo", "transformers"}


def test_no_module_is_imported_before_its_changes_are_arranged(reports):
    with_plugin, _ = reports
    assert with_plugin["unchanged"] == []


def test_plain_python_is_left_alone():
    """The start-up hook loads neither torch nor LitGPT, and says nothing."""
    result = run(
        ["-c", "import sys; print('torch' in sys.modules, 'litgpt' in sys.modules, 'litgpt_moe_ext' in sys.modules)"]
    )
    assert result.stdout == "False False True\n"
    assert result.stderr == ""


def test_start_up_hook_is_silent_when_the_package_is_gone():
    line = (HERE.parent / "litgpt_moe_ext" / "litgpt_moe_ext.pth").read_text()
    result = run(["-I", "-S", "-c", line])
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_off_switch(reports):
    """Switched off, nothing is added, and a checkpoint of the plugin fails with an error that names it."""
    with_plugin, without_plugin = reports
    assert with_plugin["a checkpoint of the plugin"] == "opens"
    assert "_requires_litgpt_moe_ext" in without_plugin["a checkpoint of the plugin"]


@pytest.mark.parametrize(
    ("value", "off"), [("1", True), ("true", True), ("YES", True), ("", False), ("0", False), ("False", False)]
)
def test_values_of_the_off_switch(monkeypatch, value, off):
    monkeypatch.setenv("LITGPT_MOE_EXT_DISABLE", value)
    assert autoload.disabled() is off


def test_registering_when_switched_off_is_an_error(monkeypatch):
    monkeypatch.setenv("LITGPT_MOE_EXT_DISABLE", "1")
    with pytest.raises(SettingsError, match="LITGPT_MOE_EXT_DISABLE: '1' switches litgpt_moe_ext off; unset it"):
        litgpt_moe_ext.register()


def test_saved_configuration_round_trip(tmp_path):
    from litgpt.utils import save_config

    config = moe_config(router_bias_update_rate=0.0125, attention_class_name="SinkAttention", attention_sinks=False)
    save_config(config, tmp_path)
    content = yaml.safe_load((tmp_path / "model_config.yaml").read_text())
    assert content["_requires_litgpt_moe_ext"] == litgpt_moe_ext.__version__
    # Class defaults are written down, so that a later change of default cannot change a trained model.
    assert content["router_score_function"] == "sigmoid"
    with warnings.catch_warnings(action="error"):  # of a newer plugin
        assert Config.from_file(tmp_path / "model_config.yaml") == config
    assert Config.from_checkpoint(tmp_path, router_bias_update_rate=0.5).router_bias_update_rate == 0.5


def test_a_field_that_no_extension_here_adds_is_named(tmp_path):
    """In a configuration of the plugin; an unknown field of another stays LitGPT's affair."""
    from litgpt.utils import save_config

    file = tmp_path / "model_config.yaml"
    for config, error, message in (
        (
            moe_config(),
            SettingsError,
            f"{file} has the field own_sharpness, which .*; if an extension adds it, install",
        ),
        (Config.from_name("pythia-14m"), TypeError, "unexpected keyword argument 'own_sharpness'"),
    ):
        save_config(config, tmp_path)
        file.write_text(file.read_text() + "own_sharpness: 2.0\n")
        with pytest.raises(error, match=message):
            Config.from_file(file)


@pytest.mark.parametrize("error", [SettingsError("router_type: 'own' is unknown"), ValueError("not ours")])
def test_only_what_the_plugin_refuses_ends_litgpt_in_one_line(error, capsys):
    module = types.ModuleType("litgpt.__main__")

    def main():
        raise error

    module.main = main
    commands.refuse_in_one_line(module)
    with pytest.raises(SystemExit if isinstance(error, SettingsError) else ValueError) as ended:
        module.main()
    refused = ended.type is SystemExit
    assert not refused or ended.value.code == 2
    assert capsys.readouterr().err == ("error: router_type: 'own' is unknown\n" if refused else "")


@pytest.mark.parametrize("version", ["99.0.1", "99.0rc1"])
def test_a_checkpoint_of_a_newer_plugin_is_announced(tmp_path, version):
    from litgpt.utils import save_config

    save_config(moe_config(), tmp_path)
    file = tmp_path / "model_config.yaml"
    ours = f"_requires_litgpt_moe_ext: {litgpt_moe_ext.__version__}"
    file.write_text(file.read_text().replace(ours, f"_requires_litgpt_moe_ext: {version}"))
    with pytest.warns(RuntimeWarning, match=rf"written by litgpt_moe_ext {version}"):
        Config.from_file(file)
