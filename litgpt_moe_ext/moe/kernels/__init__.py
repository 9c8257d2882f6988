"""How routed experts are computed: backends behind one signature, and who chooses."""
