"""Batch inference: captions of many inputs and answers to many questions, with deduplication and prefetching."""
