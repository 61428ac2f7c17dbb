"""From a budget and menus to one structure a linear."""
