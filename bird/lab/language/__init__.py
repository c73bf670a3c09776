"""Language models: preference tuning and weak-to-strong. This wing never imports the one of images."""
