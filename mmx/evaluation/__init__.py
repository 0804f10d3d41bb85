"""Evaluation: metrics, the evaluation loop, the pointing game and the deletion test."""
