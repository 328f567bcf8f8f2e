"""The optimizer, the training loop, its log and checkpoints, and runs."""
