"""Studies of whether something pays off: twins of equal cost, grids of runs over seeds, and analysis of the results."""
