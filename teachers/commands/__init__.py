"""What `python -m teachers` does: its options, the offline cache, the plan, and a look inside."""
