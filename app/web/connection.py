"""A WebSocket's connection that ends when its peer is dead, also with something left to send to it.

uvicorn closes such a connection, which waits until the peer has taken what is left: for one that is gone, or never
reads, that is for ever.
"""

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol


class Connection(WebSocketsSansIOProtocol):
    """Cut off when a ping is missed, or when the next one is due and its end still waits for the peer."""

    def send_keepalive_ping(self) -> None:
        if self.transport.is_closing():
            self.transport.abort()
        super().send_keepalive_ping()

    def keepalive_timeout(self) -> None:
        self.transport.abort()
