"""Text in, number out: caption metrics as coco-caption reports them and answer metrics as the VQA benchmark does.

An island: nothing here imports the rest of mmx, and a mistake in the input is a `ValueError` of one sentence.
"""
