"""One token through a layer at once: what lies between the matrix products of a step of decoding, as CPU kernels."""
