"""Language models: safety by preference, and weak to strong. It knows nothing of the wing of images."""
