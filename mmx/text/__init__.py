"""Tokenizer, prompts and special tokens."""
