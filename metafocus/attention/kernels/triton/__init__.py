"""Attention over spans in Triton, to the second order; the package triton is optional."""
