"""Layers and directions around a cell, and the language model around the layers."""
