"""The kernels that compute attention over spans, and the choice between them."""
