"""Every change to the names of LitGPT and torch: what, why, and until when."""
