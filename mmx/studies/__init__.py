"""Studies: variants of a small model, trained on the same synthetic texts and compared."""
