"""The tables of `benchmarks/gpu.py`, a module each, whose `rows` measures and yields the rows one by one.

`measuring/` has the clock, the card and the report, `contenders/` what is measured in more than one table.

Shape legend of all: T tokens, D model width, F hidden width of one expert, E experts, K chosen experts per token.
"""

import litgpt_moe_ext

# Before any of them imports LitGPT.
litgpt_moe_ext.register()
