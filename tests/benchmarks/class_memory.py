"""The memory that a student of a class server costs: the kernel of a notebook that has run from its first to its last cell.

    python tests/benchmarks/class_memory.py [NN ...]     notebooks; 00, 04 and 08 unless said

Starts one kernel for each notebook, runs it, and leaves all of them alive, as a class does. Then reads from /proc, so Linux only, in MiB:
resident, what the system counts for the process alone; shared, what of it other processes map too (libraries); PSS, shared pages divided by
those who share them, so that the sum over a class is the memory that it takes; peak, the most that was ever resident.
"""

import os
import re
import sys
from pathlib import Path

import nbformat
from jupyter_core.utils import run_sync
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"


def amounts(pid: int) -> dict[str, float]:
    """Resident, shared, proportional and peak memory of a process, MiB."""
    proc = Path("/proc") / str(pid)
    kib = {k: int(v) for name in ("smaps_rollup", "status") for k, v in re.findall(r"^(\w+):\s+(\d+) kB$", (proc / name).read_text(), re.M)}
    shared = kib["Shared_Clean"] + kib["Shared_Dirty"]
    return {name: value / 1024 for name, value in {"resident": kib["Rss"], "shared": shared, "PSS": kib["Pss"], "peak": kib["VmHWM"]}.items()}


def run(number: str) -> NotebookClient:
    """Run a notebook in a new kernel, which stays alive."""
    found = sorted(NOTEBOOKS.glob(f"{number}_*.ipynb"))
    if not found:
        sys.exit(f"no notebook {number!r} in {NOTEBOOKS}; say two digits, such as 08")
    client = NotebookClient(nbformat.read(found[0], as_version=4), timeout=600, kernel_name="python3", resources={"metadata": {"path": str(NOTEBOOKS)}})
    client.create_kernel_manager()
    client.start_new_kernel()
    client.start_new_kernel_client()
    for index, cell in enumerate(client.nb.cells):
        client.execute_cell(cell, index)
    return client


def main(numbers: list[str]) -> None:
    if not os.path.exists("/proc/self/smaps_rollup"):
        sys.exit("this reads /proc/PID/smaps_rollup, which Linux alone has")
    clients = {}
    try:
        for number in numbers:
            clients[number] = run(number)
        print(f"{len(clients)} kernels at once, MiB\n\n| notebook | resident | shared | PSS | peak |\n| --- | --- | --- | --- | --- |")
        for number, client in clients.items():
            print(f"| {number} | " + " | ".join(f"{value:.0f}" for value in amounts(client.km.provisioner.pid).values()) + " |")
    finally:
        for client in clients.values():
            run_sync(client.km.shutdown_kernel)(now=True)


if __name__ == "__main__":
    main(sys.argv[1:] or ["00", "04", "08"])
