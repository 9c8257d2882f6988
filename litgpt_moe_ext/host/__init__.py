"""Everything that touches LitGPT's and torch's own names: what, why, and until when."""
