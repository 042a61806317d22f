from webserver import server

__all__ = ["server"]
