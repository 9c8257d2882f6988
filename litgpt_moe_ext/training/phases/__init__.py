"""The phases of a run before its first step, in the order of `training.run`, and the checks that they make.

| file         | what it does                                                              |
| ------------ | ------------------------------------------------------------------------- |
| `plan.py`    | checks the settings as far as possible without other processes or data    |
| `launch.py`  | connects processes, locks `out_dir`, starts loggers                       |
| `start.py`   | finds what the run starts from, and makes room for its checkpoints        |
| `prepare.py` | prepares corpus and tokenizer                                             |
| `equip.py`   | makes the callbacks that settings ask for                                 |
| `checks.py`  | which settings go together                                                |
| `inputs.py`  | whether paths, weights, data and tokenizer exist and fit                  |
| `report.py`  | what is said before the first step and after the last                     |
"""
