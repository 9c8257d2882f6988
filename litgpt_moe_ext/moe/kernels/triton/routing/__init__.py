"""A router's decision: `launches` has what is called, the other modules the kernels and the functions they share."""
