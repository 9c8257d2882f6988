"""The parts of a step: its micro-batches, its loss and validation; `graphs` repeats them as CUDA graphs."""
