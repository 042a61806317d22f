"""What the tests of the service share."""

from served import make_client, make_service, stand_in

__all__ = ["make_client", "make_service", "stand_in"]
