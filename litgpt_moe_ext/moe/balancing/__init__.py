"""Balanced experts: the bias or the auxiliary losses that bring it about, and the counts that it is measured by.

- `bias` moves the balancing bias after every optimizer step.
- `losses` are the alternative: `gradient_injection` adds their gradients in any training loop, and `step_shares` has
  the shares of the global batch for one of them.
- `tally` counts tokens per expert and sums the other numbers of a router's record; `metrics` measures how even the
  load is.
"""
