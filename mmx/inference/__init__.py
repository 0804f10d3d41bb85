"""Inference: the Pipeline (caption, ask, rank, look) and batch inference."""
