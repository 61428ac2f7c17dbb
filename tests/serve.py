"""A Triton server on the CPU from the package nvidia-pytriton, for the tests and for `make serve-demo`.

`python -m tests.serve OUT [OUT ...]` serves OUT/triton until Ctrl-C, as launch.sh does where tritonserver is installed,
and the text models of further artefacts beside it. `python -m tests.serve OUT ... -- COMMAND`: while a command runs.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

SERVE = Path(sys.prefix) / "serve"
"""The environment of the server's Python, made by `make`: its numpy is older than that of the tests."""


def installed() -> bool:
    """Whether that environment is there, with the server."""
    return (SERVE / ".ready").exists() and bool(list(SERVE.glob("lib/python3.*/site-packages/pytriton")))


def free_ports(count: int) -> list[int]:
    """Ports of the loopback address that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(s.getsockname()[1]) for s in sockets]
    for s in sockets:
        s.close()
    return ports


def environment(folder: Path) -> dict[str, str]:
    """With the server and its Python on PATH. folder: for server and backend, which the package has in parts."""
    packages = next(SERVE.glob("lib/python3.*/site-packages"))
    triton = packages / "pytriton" / "tritonserver"
    backend = folder / "backends" / "python"
    if not backend.exists():
        shutil.copytree(triton / "backends" / "python", backend)
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        (folder / "bin").mkdir()
        for source, target in (
            (triton / "python_backend_stubs" / version / "triton_python_backend_stub", backend),
            (triton / "bin" / "tritonserver", folder / "bin"),
        ):
            shutil.copy(source, target)
            (target / source.name).chmod(0o755)
    return {
        "PATH": os.pathsep.join([str(folder / "bin"), str(SERVE / "bin"), os.environ["PATH"]]),
        "LD_LIBRARY_PATH": os.pathsep.join(
            [str(packages / "nvidia_pytriton.libs"), str(sysconfig.get_config_var("LIBDIR"))]
        ),
        "OMP_NUM_THREADS": "1",
        "HOME": str(folder),
    }


def running(
    outs: Sequence[Path],
    folder: Path,
    *,
    http: int,
    grpc: int,
    metrics: int,
    network: bool = False,
    log: Path | None = None,
    variables: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """launch.sh of the first OUT/triton, with the text models of the others. network: with `--network`. log: where the
    server's words go; None: where ours go. variables: of the environment, besides what the server needs."""
    variables = {**environment(folder), **(variables or {})}
    command = ["bash", str(outs[0] / "triton" / "launch.sh"), *(["--network"] if network else [])]
    command += ["--backend-directory", str(folder / "backends")]
    command += [f"--model-repository={out / 'triton' / 'repository'}" for out in outs[1:]]
    command += ["--http-port", str(http), "--grpc-port", str(grpc), "--metrics-port", str(metrics)]
    if log is None:
        return subprocess.Popen(command, env=variables)
    with log.open("wb") as output:
        return subprocess.Popen(command, env=variables, stdout=output, stderr=subprocess.STDOUT)


def ready(http: int) -> bool:
    """Whether the server answers that all its models are loaded."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{http}/v2/health/ready", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def main(outs: Sequence[str], command: Sequence[str] | None) -> int:
    """Serve until interrupted, or until `command` is done, on Triton's usual ports."""
    if not installed():
        print(f"{SERVE} is not there: run make serve-demo", file=sys.stderr)
        return 4
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as after Ctrl-C, the server is stopped
    with tempfile.TemporaryDirectory(prefix="procrustes-serve-") as folder:
        process = running([Path(out).resolve() for out in outs], Path(folder), http=8000, grpc=8001, metrics=8002)
        try:
            if command is None:
                question = f"python {outs[0]}/triton/client.py 'The capital of France is' --stream"
                print(f"when it is ready: {question}", file=sys.stderr)
                return process.wait()
            while not ready(8000):
                if process.poll() is not None:
                    return process.returncode or 1
                time.sleep(0.5)
            return subprocess.run(command, check=False).returncode
        except KeyboardInterrupt:
            return 130
        finally:
            process.terminate()
            process.wait()


if __name__ == "__main__":
    words = sys.argv[1:]
    split = words.index("--") if "--" in words else len(words)
    sys.exit(main(words[:split], words[split + 1 :] or None))
