"""Mixture-of-Experts layers: a router chooses experts for each token, the experts compute, the results are combined.

One file per part: `routers`, `experts`, `balancing` (what keeps the load even), `metrics` (how even it is), and
`layer`, which puts them together under the names that configurations use.
"""
