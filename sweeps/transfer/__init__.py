"""Does hyperparameter transfer hold? Coordinate checks and learning-rate grids over width, depth, batch and tokens.

python -m sweeps transfer [--config configs/sweeps/transfer/smoke.yaml] [--out FOLDER] [--dry-run]

Points are small models trained in this process with the trainer's own parameter groups; each is kept in a file.
"""
