from finished_run import finished_run, published_model
from webserver import server

__all__ = ["finished_run", "published_model", "server"]
