"""Language models: preferences and weak-to-strong, their data, networks, trainers and judges."""
