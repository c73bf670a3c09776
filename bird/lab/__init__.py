"""The laboratory: what reproduces the paper, images and language. Nothing in `bird` outside of it imports it, but the
command line; `pip install 'bird-kernels[lab]'` brings what it needs."""
