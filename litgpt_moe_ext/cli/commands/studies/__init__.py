"""Commands about studies and twins."""
