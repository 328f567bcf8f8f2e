"""Text in, batches of token ids out: corpus → tokenizer → tokens → batches. Knows no torch."""
