"""A Triton server on the CPU from the package nvidia-pytriton, for the tests and for `make serve-demo`.

`python -m tests.serve OUT` serves OUT/triton until Ctrl-C, as launch.sh does where tritonserver is installed.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
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


def running(
    out: Path, folder: Path, *, http: int, grpc: int, metrics: int, log: Path | None = None
) -> subprocess.Popen[bytes]:
    """OUT/triton/launch.sh, with the server and its Python on PATH. folder: for the backend, which the package has in
    parts. log: where the server's words go; None: where ours go."""
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
    environment = {
        "PATH": os.pathsep.join([str(folder / "bin"), str(SERVE / "bin"), os.environ["PATH"]]),
        "LD_LIBRARY_PATH": os.pathsep.join(
            [str(packages / "nvidia_pytriton.libs"), str(sysconfig.get_config_var("LIBDIR"))]
        ),
        "OMP_NUM_THREADS": "1",
        "HOME": str(folder),
    }
    command = ["bash", str(out / "triton" / "launch.sh"), "--backend-directory", str(folder / "backends")]
    command += ["--http-port", str(http), "--grpc-port", str(grpc), "--metrics-port", str(metrics)]
    if log is None:
        return subprocess.Popen(command, env=environment)
    with log.open("wb") as output:
        return subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)


def main(out: Path) -> int:
    """Serve until interrupted, on Triton's usual ports."""
    if not installed():
        print(f"{SERVE} is not there: run make serve-demo", file=sys.stderr)
        return 4
    with tempfile.TemporaryDirectory(prefix="procrustes-serve-") as folder:
        process = running(out.resolve(), Path(folder), http=8000, grpc=8001, metrics=8002)
        print(f"when it is ready: python {out}/triton/client.py 'The capital of France is' --stream", file=sys.stderr)
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.terminate()
            return process.wait()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
