"""The model, one file for each box of its figure, and the checkpoint format.

source               raw input -> encoder -> projection -> memory
projection           features -> keys and values
question_encoder     question and memory -> memory (optional)
decoder              tokens and memory -> logits
model                all of them
weight_tying         one key and value projection for all attention
checkpoint           saving and loading
fingerprint          a hash of the weights, which memories carry
"""
