"""Models on torch's meta device, which have shapes and no memory, and the results of operators on such tensors."""
