"""Training with accelerate: one loop, bit-exact resume, and errors instead of silently wrong results."""
