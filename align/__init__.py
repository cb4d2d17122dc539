"""Train a small captioner on rendered scenes and align it with preferences: data, objectives, training, metrics."""
