"""Mixture-of-Experts layers: a router chooses experts for each token, the experts compute, the results are combined.

- `layer`: the layers that configurations name: dense, or made of a router, routed experts and shared experts.
- `router`: what all routers share; `learned_routers` and `fixed_routers` say how each chooses; `batch_metadata` is
  what blocks are given of a batch beside hidden states.
- `tally` counts the tokens of each expert, and what else a router's `record` has; `balancing` moves the balancing bias;
  `losses` are the alternative, whose gradients `gradient_injection` adds in any training loop, one of them by the
  `step_shares` of the global batch; `metrics` tells how even the load is.
- `experts`: the stacked experts with their `activations` and the `kernels` that compute them; `expert_layouts` converts
  between stacked weights and one module per expert.
"""
