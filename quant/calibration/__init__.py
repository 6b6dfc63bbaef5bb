"""What calibration rows say of every layer's inputs, one decoder layer in memory at a time."""
