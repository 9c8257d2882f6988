"""Block sizes of the products: tables for kinds of cards, those measured on this one, and the choice among them."""
