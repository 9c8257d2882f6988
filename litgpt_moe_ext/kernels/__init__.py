"""What the kernels of attention and of experts share: operators, launches, marks for compilers, kinds of GPUs."""
