"""Metrics of generated texts: those of coco-caption for captions and of the VQA benchmark for answers.

This package imports nothing else of mmx. Invalid arguments raise ValueError.
"""
