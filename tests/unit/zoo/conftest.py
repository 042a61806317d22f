from finished_run import finished_run, published_model

__all__ = ["finished_run", "published_model"]
