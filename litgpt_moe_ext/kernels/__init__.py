"""What the kernels of attention and experts share: operators, launches, marks for compilers, kinds of GPUs."""
