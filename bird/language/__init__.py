"""Language models: a student fine-tuned or preference-tuned while a frozen teacher's features guide its own."""
