"""Settings for all tests: offline, reproducible, and one thread per process (several processes share the cores)."""

import gc
import importlib
import logging
import os
import signal
import sys

# Log handlers made during one test write to the streams that pytest replaced after it.
logging.raiseExceptions = False

# A shell starts what it puts in the background with Ctrl-C ignored, and so would every process of the tests.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# As `nohup` has them ignore the end of a terminal. A handler that does nothing is the tests' own, not their processes'.
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)

# Without compiled files, each of a hundred processes would compile the package anew.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

os.environ.setdefault("LITDATA_DISABLE_VERSION_CHECK", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Share the whole suite out among processes, a file to each in turn; what is named on the command line needs none.

    `-n 0` keeps it in one process.
    """
    option = config.option
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and "PYTEST_XDIST_WORKER" not in os.environ
    if whole and getattr(option, "numprocesses", 0) is None and not option.collectonly and not option.usepdb:
        option.numprocesses = min(4, max(2, os.cpu_count() or 1))
        option.dist = "loadfile"
        option.loadscopereorder = False


def pytest_configure(config):
    """Load what tests share, unless other processes run them: it takes seconds."""
    if not getattr(config.option, "numprocesses", None):
        # Nearly all of the millions of objects that imports make stay: to look for garbage among them is a sixth of it.
        gc.disable()
        config.pluginmanager.register(importlib.import_module("tests.shared"))


def pytest_collection_finish():
    """Look for garbage from here on, and count what is there as old."""
    gc.freeze()
    gc.unfreeze()
    gc.enable()


# They take long for the few tests that they have: begun last, they would leave the other processes without work.
LONG = (
    *("attack/test_saving.py", "host/test_guest_rule.py", "tests/test_triton.py", "recipes/test_runs.py"),
    *("test_examples.py", "training/test_run.py", "docs/test_notebook.py", "docs/test_pages.py"),
    *("parallel/test_distributed.py", "study/test_study.py", "null_gpu/test_numbers.py"),
)


def pytest_collection_modifyitems(items):
    """Put the files that take long before the others, which stay in their order."""
    items.sort(key=lambda item: not item.path.as_posix().endswith(LONG))


def pytest_make_parametrize_id(val, argname):
    """Name bytes by their argument: compressed ones hold the time, and processes must collect the same names."""
    return argname if isinstance(val, bytes) else None
