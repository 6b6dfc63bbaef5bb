"""Teacher targets on disk."""
