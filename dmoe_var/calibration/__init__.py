"""Find tau for a budget: recorded router scores, a measured loss, equal loss per FLOP saved."""
