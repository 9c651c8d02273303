"""Records, the loaders that make them, images and specialties."""
