"""supervise.py tritonserver ...: runs the server, and asks its models every few seconds; called by launch.sh.

Once a model's process has ended, Triton answers all of the model's requests with an error, and goes on calling it
ready. Then, and when the server crashes, the server is ended and started again, up to RESTARTS times in ten minutes
(5). 0 leaves that to whatever started us, such as a container's restart policy. Exits with the server's code, or with 1
where it is not started again.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time

import probe

EVERY, PATIENCE = 2.0, 3  # seconds between two probes; failures in a row that make a dead model
GRACE = 5.0  # seconds that a server with a dead model has to end: it waits for answers that never come
PERIOD = 600.0
RESTRICTED = (401, 403)


def value_of(arguments, name, default):
    """Value of a flag of tritonserver, which takes --name value and --name=value."""
    for place, argument in enumerate(arguments):
        if argument == name:
            return arguments[place + 1] if place + 1 < len(arguments) else default
        if argument.startswith(f"{name}="):
            return argument.partition("=")[2]
    return default


def url_of(arguments):
    """Where the models can be asked; None without HTTP."""
    if value_of(arguments, "--allow-http", "true").lower() in ("false", "0"):
        return None
    address = value_of(arguments, "--http-address", "127.0.0.1")
    address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)
    host = f"[{address}]" if ":" in address else address
    return f"http://{host}:{value_of(arguments, '--http-port', '8000')}"


def say(text):
    print(f"launch.sh: {text}", file=sys.stderr, flush=True)


def ends_with_us():
    """In the server's process, before it starts: it ends when we are killed, rather than to hold its ports for ever."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


class Supervisor:
    """One server after the other, until one ends as it should or a signal asks to stop."""

    def __init__(self, arguments, restarts):
        self.arguments, self.restarts, self.url = arguments, restarts, url_of(arguments)
        self.started, self.stopping, self.server = [], False, None  # started: when, again
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.stop)
        if self.url is None:
            say("without HTTP the models cannot be asked whether they answer")

    def stop(self, number, frame):
        self.stopping = True
        if self.server is not None and self.server.poll() is None:
            self.server.terminate()

    def run(self):
        """The exit code."""
        while True:
            # In a session of its own: Ctrl-C is for us, who hand it on once, for two of them end Triton at once.
            self.server = subprocess.Popen(self.arguments, start_new_session=True, preexec_fn=ends_with_us)
            if self.stopping:
                self.server.terminate()
            lived, dead = self.watch()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.server.pid, signal.SIGKILL)  # processes of models that outlive it, with their memory
            code = self.server.returncode
            if self.stopping or not (dead or (code != 0 and (lived or self.started))):
                return code if code >= 0 else 128 - code
            now = time.monotonic()
            self.started = [then for then in self.started if now - then < PERIOD] + [now]
            if len(self.started) > self.restarts:
                if self.restarts:
                    say(f"the server was started again {self.restarts} times in ten minutes, and no more")
                return 1
            say(f"the server is started again, time {len(self.started)} of {self.restarts} in ten minutes")

    def watch(self):
        """Until the server has ended: whether it was ever ready, and whether we ended it, its models being dead."""
        self.lived, failures, last = False, 0, 0.0
        while self.server.poll() is None:
            time.sleep(0.2)
            if self.url is None or self.stopping or time.monotonic() < last + EVERY:
                continue
            reason = self.failure()
            failures = 0 if reason is None else failures + 1
            last = time.monotonic()
            if reason is None or self.stopping or self.server.poll() is not None:
                continue
            say(f"{reason} (failure {failures} of {PATIENCE})")
            if failures == PATIENCE:
                say("the server is ended, for its model does not answer")
                self.end()
                return self.lived, True
        if not self.stopping:
            say(f"tritonserver has ended with status {self.server.returncode}")
        return self.lived, False

    def failure(self):
        """Why the models of a server that has loaded them do not answer; None when they do, or are being loaded."""
        try:
            self.lived = self.lived or probe.call(self.url, "/v2/health/ready")[0] == 200
            if self.lived:
                probe.ask(self.url)
        except probe.NotReadyError as reason:
            if reason.status in RESTRICTED:  # by --http-restricted-api
                say(f"{reason}; so the models are not watched")
                self.url = None
            elif self.lived:
                return str(reason)
        return None

    def end(self):
        """Soon: a server with a dead model waits for answers that never come."""
        self.server.terminate()
        try:
            self.server.wait(GRACE)
        except subprocess.TimeoutExpired:
            self.server.kill()
            self.server.wait()


if __name__ == "__main__":
    count = os.environ.get("RESTARTS", "5")
    if not count.isdigit():
        say(f"RESTARTS must be a number, not {count!r}")
        sys.exit(2)
    sys.exit(Supervisor(sys.argv[1:], int(count)).run())
