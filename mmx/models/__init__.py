"""Model parts and the checkpoint format: projection, source, decoder, question encoder, model, weight tying."""
