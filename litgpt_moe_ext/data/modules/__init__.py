"""The data modules that recipes name."""
