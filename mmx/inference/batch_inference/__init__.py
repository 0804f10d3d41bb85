"""Many inputs at a time: batches of pictures, and of questions that share one; what cannot be read is no obstacle."""

from mmx.inference.batch_inference.answers import answers
from mmx.inference.batch_inference.captions import captions
from mmx.inference.outputs import GeneratedText, Question, TextGenerator

__all__ = ["Question", "GeneratedText", "TextGenerator", "answers", "captions"]
