"""The process that runs torch_peer.py: torch and transformers on the same GPU, for what is compared with them."""
import importlib.util
import json
import pathlib
import queue
import subprocess
import sys
import threading

from servers import Failure, Spent

SCRIPT = pathlib.Path(__file__).parent / "torch_peer.py"


class Peer:
    """Answers one question at a time. Beginning takes some seconds, in which something else may be done."""

    def __init__(self, run, device):
        self.run, self.path, self.child, self.answers = run, run.work / "logs" / "torch.txt", None, queue.Queue()
        if any(importlib.util.find_spec(name) is None for name in ("torch", "transformers")):
            return run.say("torch or transformers is not here: there is nothing to compare with\n")
        with self.path.open("w") as log:
            command = [sys.executable, "-u", str(SCRIPT), device.split(":")[0]]
            self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        run.processes.append(self)

        def read():
            for line in self.child.stdout:
                if line.startswith("{"):
                    self.answers.put(json.loads(line))
            self.answers.put(None)

        threading.Thread(target=read, daemon=True).start()

    def begin(self, do, **question):
        """Asks; `end` waits for the answer."""
        if self.child is None:
            raise Failure("torch is not there, or has ended")
        try:
            self.child.stdin.write(json.dumps({"do": do, **question}) + "\n")
            self.child.stdin.flush()
        except OSError as error:
            raise Failure(f"torch has ended: {error}") from error

    def end(self, seconds):
        """The answer to what was asked last. If it does not come in time the process is ended: it may be in a loop."""
        if self.child is None:
            raise Failure("torch is not there, or has ended")
        try:
            answer = self.answers.get(timeout=self.run.within(seconds))
        except (queue.Empty, Spent) as error:
            self.close()
            raise Failure(f"torch did not answer in {seconds} s") from error
        if answer is None:
            end = self.path.read_text(errors="replace").strip()[-300:]
            self.close()
            raise Failure(f"torch ended: {end}")
        if "error" in answer:
            raise Failure(f"torch: {answer['error']}")
        return answer

    def ask(self, do, seconds, **question):
        self.begin(do, **question)
        return self.end(seconds)

    def there(self):
        return self.child is not None

    def close(self):
        if self.child is not None:
            self.child.kill()
            self.child.wait()
            self.child = None
            self.run.processes.remove(self)
            self.run.log("torch", self.path.read_text(errors="replace"))
