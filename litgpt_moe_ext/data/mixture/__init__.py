"""Several corpora in fixed shares: which row comes from which, and loaders over them. `data.Mixture` uses them."""
