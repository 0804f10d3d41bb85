"""Encoders: plugins that turn one kind of input into features, and know nothing of the decoder."""
