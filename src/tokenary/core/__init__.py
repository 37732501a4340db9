"""What every room shares: token maps, cards, recipes, budgets, laws, claims, errors. Pure torch; no transformers."""
