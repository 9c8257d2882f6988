"""Does it pay? Twins of equal cost, grids of runs over seeds, and what their results mean."""
