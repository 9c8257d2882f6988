"""Routers: what all of them share, those that learn, fixed ones as baselines, and the record of what a router did."""
