"""The trainer: one loop, several DeepSpeed engines, soft and hard targets mixed per token."""
