"""Optuna studies over the configuration; each trial is a real training run in its own process.

Nothing runs here yet: the floor is reserved so that the import contract covers it.
"""
