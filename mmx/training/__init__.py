"""Training with accelerate: one loop, resumable to the bit, that stops with a sentence rather than go on wrongly."""
