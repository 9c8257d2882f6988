"""Models on torch's meta device, which have shapes and no memory, and what operators make of such tensors."""
