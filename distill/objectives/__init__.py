"""What one optimiser step does. Co-distillation is the first; others run over the same loop."""
