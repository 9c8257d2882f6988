"""The data modules that recipes can name."""
