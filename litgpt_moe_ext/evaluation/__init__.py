"""Evaluation of LitGPT checkpoints without conversion, also with EleutherAI's LM Evaluation Harness (lm-eval).

| file                    | what it holds                                                                   |
| ----------------------- | ------------------------------------------------------------------------------- |
| `loading.py`            | opens checkpoints; the one place that reads `lit_model.pth` for inference         |
| `tokenization.py`       | text to token ids and back, without special tokens                               |
| `batching.py`           | how many requests go through a model at once                                     |
| `scoring.py`            | log-probabilities of given tokens                                                |
| `perplexity.py`         | perplexity and bits per byte                                                     |
| `hellaswag.py`          | HellaSwag from a local file                                                      |
| `sampling.py`           | how the next token is chosen                                                     |
| `generation.py`         | continues many prompts at once                                                   |
| `streaming.py`          | continues one text token by token                                                |
| `litgpt_evaluate.py`    | `litgpt evaluate` for what LitGPT's own command cannot evaluate                  |
| `harness/`              | a LitGPT model as a model of lm-eval, its tasks, and benchmarks during a training |

Nothing is imported here: lm-eval takes seconds to load.
"""
