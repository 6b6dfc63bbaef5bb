"""The report's plots, one concept a file: `draw(record, size)` is a figure, or None without data."""
