"""One file or folder a method: what a recipe's structure and fit mean from end to end."""
