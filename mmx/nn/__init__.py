"""Neural-network building blocks: attention, layers, relative positions, KV cache, transformer, prepacked linears."""
