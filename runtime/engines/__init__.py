"""TensorRT: engines from a bundle's graphs, where they are kept, and running them."""
