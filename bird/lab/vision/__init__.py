"""Images: data sets, corruptions, networks, training, experiments and their reports.

It knows nothing of the wing of language.
"""
