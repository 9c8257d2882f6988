"""Train a model: `uv run python run_train.py [--config configs/....yaml] [--resume auto] [--KEY VALUE ...]`.

Without `--config` it trains the quickstart: a small Mixture-of-Experts model on the Python standard library's own
source.
"""

import sys
from pathlib import Path

from litgpt_moe_ext.cli.train import main

if __name__ == "__main__":
    sys.exit(main(default_config=Path(__file__).resolve().parent / "configs" / "quickstart.yaml"))
