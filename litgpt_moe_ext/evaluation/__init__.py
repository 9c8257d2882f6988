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
| `lm_eval_model.py`      | a LitGPT model as a model of lm-eval                                             |
| `lm_eval_tasks.py`      | the tasks that `--tasks` names                                                   |
| `training_benchmarks.py` | benchmarks of a model that is being trained, on all of its processes             |

Nothing is imported here: lm-eval takes seconds to load.
"""
