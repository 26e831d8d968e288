"""Fused kernels behind drop-in Kolors-class text-to-image models."""
