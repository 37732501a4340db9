"""Make the environment that kvpress runs in, beside ours, for ``tokenary compare --room memory --peers``.

kvpress asks for an older transformers than Tokenary does, so it gets an environment of its own below the cache folder;
torch, and whatever else fits, is taken from the environment that runs this script.

    python scripts/install_kvpress.py
"""

from __future__ import annotations

import subprocess
import sysconfig
import venv

from tokenary.bench.memory_peers import environment, python_of, site_packages_of

PINS = ("kvpress==0.5.5", "transformers==5.2.0")


def main() -> None:
    """Create the environment, let it see ours behind its own packages, and install the pins."""
    folder = environment()
    venv.create(folder, with_pip=True, clear=True)
    (site_packages_of(folder) / "behind.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    subprocess.run([python_of(folder), "-m", "pip", "install", "--disable-pip-version-check", *PINS], check=True)
    print(folder)


if __name__ == "__main__":
    main()
