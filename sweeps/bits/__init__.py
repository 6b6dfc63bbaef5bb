"""How many bits each group of layers gets: measured by forward passes, solved exactly, searched with Optuna."""
