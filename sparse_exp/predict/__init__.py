"""A detector in use on images and videos: ``python -m sparse_exp.predict``."""
