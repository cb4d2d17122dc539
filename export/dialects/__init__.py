"""The forms a graph can take. A dialect says which operators attention, norms and quantized products become."""
