"""`run_train.py` on null GPUs that compute."""

import sys

import tests.null_gpu.computing  # noqa: F401  # patches what follows
from litgpt_moe_ext.cli.train import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
