"""Make the environment that kvpress runs in, beside ours, for ``tokenary compare --room memory --peers``.

kvpress asks for an older transformers than Tokenary does, so it gets an environment of its own below the cache folder;
torch, and whatever else fits, is taken from the environment that runs this script.

    python scripts/install_kvpress.py
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv

from tokenary.bench.memory_peers import environment, python_of, site_packages_of

PINS = ("kvpress==0.5.5", "transformers==5.2.0")


def main() -> None:
    """Create the environment, let it see ours behind its own packages, and install the pins."""
    folder = environment()
    venv.create(folder, with_pip=True, clear=True)
    ours = dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
    (site_packages_of(folder) / "behind.pth").write_text("\n".join([*ours, ""]), encoding="utf-8")
    # pip sees Tokenary behind, which wants a newer transformers, and would warn of it
    install = [
        str(python_of(folder)),
        "-P",
        "-m",
        "pip",
        "install",
        "--disable-pip-version-check",
        "--no-warn-conflicts",
    ]
    if subprocess.run([*install, *PINS]).returncode:
        shutil.rmtree(folder)  # half an environment would be taken for a whole one
        sys.exit("kvpress could not be installed: pip says why")
    print(folder)


if __name__ == "__main__":
    main()
