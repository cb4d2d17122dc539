"""The reference's preprocessing in numpy: frame indices, pixels, sound and filter bank."""
