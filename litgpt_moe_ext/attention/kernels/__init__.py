"""How attention is computed: kernels behind one signature, and who chooses."""
