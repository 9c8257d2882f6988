"""Forward and backward passes, what happens to their gradients, and validation as CUDA graphs."""
