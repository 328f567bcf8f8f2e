"""Recurrent layers, embeddings, output heads, and the networks built from them."""
