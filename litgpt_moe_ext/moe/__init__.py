"""Mixture-of-Experts layers: a router chooses experts for each token, the experts compute, the results are combined.

- `layer`: the layers that configurations name: dense, or made of a router, routed experts and shared experts.
- `routing/`: the routers; `batch_metadata` carries what a block needs to know about a batch besides its hidden states.
- `balancing/`: the balancing bias, auxiliary losses, and the statistics of the load.
- `experts`: the stacked experts with their `activations` and the `kernels/` that compute them; `expert_layouts`
  converts between stacked weights and one module per expert.
- `registry`: what a configuration can name.
"""
