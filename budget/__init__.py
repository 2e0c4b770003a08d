"""A level for every layer within a budget: costs, losses, the dynamic programme, the search."""
