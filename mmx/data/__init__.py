"""Data sets in published formats and generated scenes, as examples (`mmx.data.examples`) and training batches."""
