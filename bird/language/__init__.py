"""BIRD for language models: responses of students, and judges of them."""
