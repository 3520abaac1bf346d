"""An OCI runtime for machines without CAP_SYS_RESOURCE, where runc cannot start the privileged containers of kind.

dockerd calls it like runc. It takes that capability, the resource limits and the OOM score out of what is asked for,
and becomes runc.
"""

import json
import os
import shutil
import sys
from pathlib import Path


def without_limits(file: Path, *, is_bundle: bool) -> None:
    """Rewrite a container's config.json, or the description of one more process in it."""
    content = json.loads(file.read_text(encoding="utf-8"))
    process = content["process"] if is_bundle else content
    for names in (process.get("capabilities") or {}).values():
        if names and "CAP_SYS_RESOURCE" in names:
            names.remove("CAP_SYS_RESOURCE")
    process.pop("rlimits", None)
    process.pop("oomScoreAdj", None)
    file.write_text(json.dumps(content), encoding="utf-8")


def main(arguments: list[str]) -> None:
    """Do as runc does with ``arguments``."""
    if "create" in arguments or "run" in arguments:
        bundle = arguments[arguments.index("--bundle") + 1] if "--bundle" in arguments else "."
        without_limits(Path(bundle) / "config.json", is_bundle=True)
    elif "exec" in arguments:
        for flag in {"--process", "-p"} & set(arguments):
            without_limits(Path(arguments[arguments.index(flag) + 1]), is_bundle=False)
    runc = shutil.which("runc", path="/usr/local/sbin:/usr/sbin:/usr/local/bin:/usr/bin:/sbin:/bin")
    os.execv(runc or "/usr/sbin/runc", ["runc", *arguments])


if __name__ == "__main__":
    main(sys.argv[1:])
