"""The parts of a step: its micro-batches, its loss, its CUDA graphs, and validation."""
