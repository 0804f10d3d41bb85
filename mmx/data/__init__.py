"""Data: files in the formats people have, and generated scenes, to batches of the one shape `mmx.data.examples`."""
