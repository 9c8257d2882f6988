"""Evaluation of LitGPT checkpoints with EleutherAI's LM Evaluation Harness (lm-eval), without converting them.

Nothing is imported here: lm-eval takes seconds to load, and `litgpt_moe_ext.host.seams` only needs
`litgpt_moe_ext.evaluation.evaluate`, which loads it when an evaluation starts.
"""
