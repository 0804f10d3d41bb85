"""Encoder plugins: each turns one kind of raw input into features, independently of the decoder."""
