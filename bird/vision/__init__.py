"""Images: the shipped data, corruptions and small networks. Knows nothing of the rest of `bird`."""
