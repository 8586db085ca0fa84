"""A network for each worker: namespaces of Linux, joined by a bridge, whose packets can be lost without a word. Needs root."""
import subprocess

# Of the bridge, which this process and the coordinators are on; worker n has the address n + 2.
BRIDGE, PREFIX = "strata-faults", "10.231.77."
# A machine that there is not: what is sent to it is lost, and nobody is told.
NOWHERE = "02:00:00:00:00:99"


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")


class Network:
    """The bridge and so many namespaces on it."""

    def __init__(self, count):
        self.count, self.host = count, f"{PREFIX}1"
        self.close()
        try:
            run("ip", "link", "add", BRIDGE, "type", "bridge")
            run("ip", "address", "add", f"{self.host}/24", "dev", BRIDGE)
            run("ip", "link", "set", BRIDGE, "up")
            for n in range(count):
                run("ip", "netns", "add", self.name(n))
                run("ip", "link", "add", self.wire(n), "type", "veth", "peer", "name", "eth0", "netns", self.name(n))
                run("ip", "link", "set", self.wire(n), "master", BRIDGE, "up")
                self.inside(n, "address", "add", f"{self.address(n)}/24", "dev", "eth0")
                self.inside(n, "link", "set", "lo", "up")
                self.inside(n, "link", "set", "eth0", "up")
        except (OSError, RuntimeError) as error:
            self.close()
            raise SystemExit(f"--network: {error}; it needs root, and Linux's `ip`") from error

    @staticmethod
    def name(n):
        return f"{BRIDGE}-{n}"

    @staticmethod
    def wire(n):
        return f"sfaults{n}"

    @staticmethod
    def address(n):
        return f"{PREFIX}{n + 2}"

    def inside(self, n, *command):
        run("ip", "-netns", self.name(n), *command)

    def command(self, n):
        """What a command begins with that runs in a namespace."""
        return ["ip", "netns", "exec", self.name(n)]

    def plug(self, n, plugged):
        """Pulls the cable of a worker, or puts it back."""
        run("ip", "link", "set", self.wire(n), "up" if plugged else "down")

    def lose(self, sender, receiver):
        """From now on what `sender` sends to `receiver` is lost; None is the machine of the coordinators."""
        self._neighbour(sender, receiver, "replace", "lladdr", NOWHERE, "nud", "permanent")

    def find(self, sender, receiver):
        """Ends that."""
        self._neighbour(sender, receiver, "del")

    def _neighbour(self, sender, receiver, what, *entry):
        address = self.host if receiver is None else self.address(receiver)
        if sender is None:
            run("ip", "neighbour", what, address, *entry, "dev", BRIDGE)
        else:
            self.inside(sender, "neighbour", what, address, *entry, "dev", "eth0")

    def others(self, n):
        return [None, *(other for other in range(self.count) if other != n)]

    def narrow(self, n, rate):
        """Lets a worker send so much at most, as `1mbit`; None lets it send all."""
        if rate:
            self.inside_tc(n, "add", "dev", "eth0", "root", "tbf", "rate", rate, "burst", "3000", "latency", "400ms")
        else:
            self.inside_tc(n, "del", "dev", "eth0", "root")

    def inside_tc(self, n, *command):
        run("tc", "-netns", self.name(n), "qdisc", *command)

    def close(self):
        for n in range(self.count):
            for command in (["ip", "link", "del", self.wire(n)], ["ip", "netns", "del", self.name(n)]):
                subprocess.run(command, capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True, check=False)
