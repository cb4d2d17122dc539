"""What all rooms agree on, as plain data: the manifest of a bundle, a family's pipeline, the registries."""
