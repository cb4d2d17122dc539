"""TensorRT: build engines from a bundle's graphs, keep them, run them."""
