"""Studies: two ways of building the same small model, trained side by side on texts made for the question."""
