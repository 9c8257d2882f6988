"""The routed experts in Triton, for every NVIDIA card since Turing; nothing here waits for the device."""
