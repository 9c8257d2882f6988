"""Pretraining through LitGPT's own loop, and everything a run needs around it.

A run is a sequence of phases (`run`); each takes the results of earlier ones:

    Settings -> Plan -> Launched -> Start -> Prepared -> Equipment -> Outcome

Which file to open for which question:

| question                                                        | file                           |
| --------------------------------------------------------------- | ------------------------------ |
| What can be set, with which default, range and meaning?         | `settings/`                    |
| In which order does a run do things?                            | `run`                          |
| Do the settings go together?                                    | `phases/plan`, `phases/checks` |
| Do the paths and data that they name exist and fit?             | `phases/inputs`                |
| How are processes connected, `out_dir` locked, loggers started? | `phases/launch`, `parallel/`   |
| What does a run resume from, and what is moved aside?           | `phases/start`, `checkpoint/`  |
| Where do corpus and tokenizer come from?                        | `phases/prepare`               |
| Which callbacks does a setting add, in which order?             | `phases/equip`, `callbacks/`   |
| Which events can a callback act on?                             | `callback`                     |
| Where are the hooks in LitGPT's loop?                           | `loop`, `fabric`               |
| What makes a run stop?                                          | `control`                      |
| Who makes the optimizer and sets the learning rate?             | `optim/`                       |
| Is the model compiled?                                          | `compilation`                  |
| What is a step's loss, over micro-batches and ranks?            | `steps/`                       |
| Which files have the numbers and lines of a run?                | `logs/`                        |
| What is said before the first step and after the last?          | `phases/report`                |
"""
