"""Short training after the cut: methods, objective, data, trainer."""
