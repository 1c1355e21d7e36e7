"""A particle filter that knows nothing of diffusion; torch only. Groups of particles share tensors of shape (G, K)."""
