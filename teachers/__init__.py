"""Where soft targets come from: a frozen teacher, or one that trains beside its students."""
