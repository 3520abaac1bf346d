"""What a cluster leaves on a machine while it runs: mounts, network links, daemons."""

from pathlib import Path

DAEMONS = ("dockerd", "containerd", "kubelet", "kube-apiserver", "etcd")


def traces() -> frozenset[str]:
    """Return the mounts and the network links of this machine, and the daemons that run; nothing but on Linux."""
    if not Path("/proc/self/mounts").exists():
        return frozenset()
    mounts = {line.split()[1] for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()}
    links = {f"link {link.name}" for link in Path("/sys/class/net").iterdir()}
    return frozenset(mounts | links | set(_daemons()))


def _daemons() -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            name = (process / "comm").read_text(encoding="utf-8").strip()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended meanwhile
        if name in DAEMONS:
            found.append(f"{name} ({process.name})")
    return found
