"""The update, the record of it, and the loop."""
