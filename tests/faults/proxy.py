"""A TCP proxy that can be told to misbehave, for links between workers."""
import socket
import threading

# What happens once, and then all is well.
ONCE = {"cut", "flip", "truncate"}


class Proxy:
    """Listens on a port of `host` before another address, from now on or later."""

    def __init__(self, target, host="127.0.0.1"):
        self.target, self.host = target, host
        self.faults = {"forth": None, "back": None}
        self.lock = threading.Lock()
        self.listener = socket.create_server((host, 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def set(self, fault, *ways):
        """`blackhole` swallows bytes while sockets stay open, None ends that; `cut`, `flip` and `truncate` happen once."""
        with self.lock:
            for way in ways:
                self.faults[way] = fault

    def _take(self, way):
        with self.lock:
            fault = self.faults[way]
            if fault in ONCE:
                self.faults[way] = None
            return fault

    def _accept(self):
        while True:
            client, _ = self.listener.accept()
            try:
                server = socket.create_connection(self.target)
            except OSError:
                client.close()
                continue
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for way, source, sink in (("forth", client, server), ("back", server, client)):
                threading.Thread(target=self._carry, args=(way, source, sink), daemon=True).start()

    def _carry(self, way, source, sink):
        try:
            while data := source.recv(1 << 16):
                fault = self._take(way)
                middle = len(data) // 2
                if fault == "blackhole":
                    continue
                if fault == "flip":
                    data = data[:middle] + bytes([data[middle] ^ 0x10]) + data[middle + 1:]
                if fault == "truncate":
                    sink.sendall(data[:middle])
                if fault in ("cut", "truncate"):
                    break
                sink.sendall(data)
        except OSError:
            pass
        # Also ends the other way.
        for end in (source, sink):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
