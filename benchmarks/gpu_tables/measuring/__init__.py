"""How a table is measured: the time there is, the clock, the card, and what becomes of its rows."""
