"""The command lines: `run_train.py` and `litgpt-moe`."""
