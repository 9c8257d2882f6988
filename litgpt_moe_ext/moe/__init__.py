"""Mixture-of-Experts layers: a router chooses experts for each token, the experts compute, the results are combined.

- `layer`: the layers that configurations name: dense, or made of a router, routed experts and shared experts.
- `router`: what all routers share; `learned_routers` and `fixed_routers` are the routers themselves; `batch_metadata`
  carries what a block needs to know about a batch besides its hidden states.
- `tally` counts tokens per expert and sums the other numbers of a router's `record`; `balancing` moves the balancing
  bias; `losses` are the alternative: `gradient_injection` adds their gradients in any training loop, and `step_shares`
  has the shares of the global batch for one of them; `metrics` measures how even the load is.
- `experts`: the stacked experts with their `activations` and the `kernels` that compute them; `expert_layouts` converts
  between stacked weights and one module per expert.
"""
