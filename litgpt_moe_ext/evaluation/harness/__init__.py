"""LitGPT models under EleutherAI's LM Evaluation Harness (lm-eval).

| file          | what it holds                                                         |
| ------------- | --------------------------------------------------------------------- |
| `model.py`    | a LitGPT model as a model of lm-eval                                  |
| `tasks.py`    | the tasks that `--tasks` names                                        |
| `names.py`    | metrics, aggregations and filters that a task file names              |
| `training.py` | benchmarks of a model in training, on all of its processes            |

Nothing is imported here: lm-eval takes seconds to load.
"""
