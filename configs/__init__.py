"""The recipes that `--config NAME` finds."""
