"""Pretraining through LitGPT's own loop, with what a run needs around it.

`entry.setup` is the door: LitGPT's arguments plus a few. `loop` says where the hooks hang; each hook is a small class
or module with one job (`checkpoints`, `progress`, `sampling`, `control`), and none knows the others.
"""
