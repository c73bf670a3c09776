"""Images: data sets, corruptions and networks. They know nothing of the rest of `bird` but how a file is written."""
