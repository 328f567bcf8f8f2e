"""How a cell runs over time, and how a hidden state becomes a loss."""
