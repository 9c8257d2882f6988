"""Kernels of the routers on a GPU: decision, losses and statistics, the product, and the balancing bias."""
