"""A particle filter that knows nothing of diffusion; torch only.

Tensors of shape (G, K) hold G groups of K particles. Each group is weighed and resampled alone.
"""
