"""The measured processes of search.py, and how busy the machine is with anything else."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import time
from pathlib import Path
from typing import Any

WORKER = Path(__file__).parent / "peers" / "worker.py"


class PeerError(RuntimeError):
    """A measured process failed; the message ends with what it said."""


class Process:
    """One system in a process of its own. `ask` sends a request of worker.py and waits."""

    def __init__(self, name: str, python: str, adapter: str, log: Path, threads: int, device: str):
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        if device == "cpu":
            environment |= {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}
        self.name, self.log = name, log
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                [python, str(WORKER), adapter],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                env=environment,
                text=True,
            )

    def ask(self, do: str, **arguments: Any) -> Any:
        assert self.process.stdin and self.process.stdout
        try:
            print(json.dumps({"do": do} | arguments), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            said = self.log.read_text(errors="replace").strip()[-2000:]
            raise PeerError(f"{self.name}: the process ended ({self.process.wait()}): {said}")
        answer = json.loads(line)
        if isinstance(answer, dict) and "error" in answer:
            raise PeerError(f"{self.name}: {answer['error'].strip()}")
        return answer

    def cpu_seconds(self) -> float:
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: Any) -> None:
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.close()  # the worker's loop ends with its input
            self.process.wait(timeout=20)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        finally:
            self.process.stdout.close()


class OtherLoad:
    """Cores that anything but these processes kept busy, on average, since `start`."""

    def __init__(self, processes: list[Process]):
        self.processes = processes
        self.start = self._now()

    def cores(self) -> float | None:
        """None where /proc/stat is missing."""
        now = self._now()
        if now is None or self.start is None:
            return None
        wall, busy, own = (b - a for a, b in zip(self.start, now, strict=True))
        return round(max(busy - own, 0.0) / wall, 2)

    def _now(self) -> tuple[float, float, float] | None:
        """Wall, the machine's busy and our own processes' seconds."""
        try:
            ticks = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        except OSError:
            return None
        user, nice, system, _, _, irq, softirq, _ = ticks
        busy = (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        own = time.process_time() + ended.ru_utime + ended.ru_stime
        running = sum(p.cpu_seconds() for p in self.processes if p.process.returncode is None)
        return time.perf_counter(), busy, own + running
