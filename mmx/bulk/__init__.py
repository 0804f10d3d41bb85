"""Many inputs at a time: batches of pictures, and of questions that share one; what cannot be read is no obstacle."""

from mmx.bulk.answering import answers
from mmx.bulk.captioning import captions
from mmx.bulk.spoken import Asked, Said, Speaker

__all__ = ["Asked", "Said", "Speaker", "answers", "captions"]
