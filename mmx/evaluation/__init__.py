"""Evaluation of models: metrics of generated texts, losses, information, and the faithfulness of attention maps."""
