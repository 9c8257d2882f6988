"""Mixtures of corpora in fixed shares: the corpus of each row, and loaders over them. `data.Mixture` uses them."""
