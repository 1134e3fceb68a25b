"""Make the environment that Loraport runs in: `python3 requirements/install.py .venv`.

Finds out whether this machine has an NVIDIA GPU, installs the pinned set that belongs to it (cpu.txt or cuda.txt)
without resolving anything, and puts `loraport` itself in as an editable install. A second call does nothing.

Only the standard library, and no syntax newer than Python 3.6: it runs before anything is installed, and on a
Python that is too old it must live long enough to say so.

    python3 requirements/install.py .venv              # what `make setup` runs
    python3 requirements/install.py .venv --test       # and what the tests and the linters need
    DEVICE=cpu python3 requirements/install.py .venv   # not what was detected
"""

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
OLDEST, NEWEST = (3, 11), (3, 13)
# PyTorch publishes its CPU builds only here; an index or folder that you configured is asked first.
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def fail(sentence, hint):
    """End with exit code 3, a refusal, in the form that all of Loraport's errors have."""
    sys.stderr.write("error: %s\nhint: %s\n" % (sentence, hint))
    sys.exit(3)


def check_python(version):
    """Refuse a Python for which the pinned sets have no wheels. `version`: (major, minor, ...)."""
    if not OLDEST <= tuple(version[:2]) <= NEWEST:
        found, oldest, newest = (".".join(str(part) for part in v[:2]) for v in (version, OLDEST, NEWEST))
        fail(
            "Python %s is not supported; Loraport needs %s to %s." % (found, oldest, newest),
            "install Python %s and run: make setup PYTHON=python%s" % (oldest, oldest),
        )


def detect_device():
    """Return "cuda" where a driver answers for at least one GPU, else "cpu"; DEVICE overrides."""
    wanted = os.environ.get("DEVICE", "")
    if wanted:
        if wanted not in ("cpu", "cuda"):
            fail("DEVICE=%s is not known." % wanted, "use DEVICE=cpu or DEVICE=cuda, or leave it out")
        return wanted
    tool = shutil.which("nvidia-smi")
    listed = subprocess.run([tool, "-L"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) if tool else None
    return "cuda" if listed is not None and listed.returncode == 0 and b"GPU " in listed.stdout else "cpu"


def fingerprint(files):
    """Hash of the files that decide what is installed, this script among them."""
    digest = hashlib.sha256()
    for path in sorted(files) + [os.path.abspath(__file__)]:
        with open(path, "rb") as handle:
            digest.update(handle.read())
    return digest.hexdigest()


def read(path):
    """The text of a file; empty where there is none."""
    if not os.path.exists(path):
        return ""
    with open(path) as handle:
        return handle.read()


class Installer:
    """uv where it is there (seconds), pip inside the environment otherwise (about a minute)."""

    def __init__(self, venv):
        self.python = os.path.join(venv, "bin", "python")
        self.uv = shutil.which("uv")
        self.environment = dict(os.environ, VIRTUAL_ENV=os.path.abspath(venv))
        if self.uv and os.environ.get("PIP_FIND_LINKS"):  # uv does not read pip's settings
            self.environment.setdefault("UV_FIND_LINKS", os.environ["PIP_FIND_LINKS"])

    def create(self, venv):
        """Make the empty environment `venv`, replacing a broken one."""
        if self.uv:
            subprocess.check_call([self.uv, "venv", "--quiet", "--clear", "--python", sys.executable, venv])
        elif subprocess.call([sys.executable, "-m", "venv", "--clear", venv]):
            fail("python3 -m venv failed.", "install the venv module (Debian, Ubuntu: apt install python3-venv) or uv")

    def try_install(self, *arguments):
        """Install what `arguments` name without their dependencies; return whether it worked, keep the output."""
        command = [self.uv, "pip", "install"] if self.uv else [self.python, "-m", "pip", "install"]
        done = subprocess.run(
            command + ["--quiet", "--no-deps"] + list(arguments),
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.output = done.stdout.decode(errors="replace")
        return done.returncode == 0

    def install(self, what, *arguments):
        """The same, but a failure ends the program with the installer's own words above ours."""
        if not self.try_install(*arguments):
            sys.stderr.write(self.output)
            fail("could not install %s." % what, "the package installer's words are above; is this machine online?")


def install_pins(installer, path):
    """Install a pinned set; a CPU build of torch from your own package sources, else from PyTorch's index."""
    pin = re.search(r"^torch==\S+", read(path), re.M).group()
    if "+cpu" in pin and not installer.try_install(pin):
        installer.install(pin, "--index-url", TORCH_CPU_INDEX, pin)
    installer.install(os.path.relpath(path, ROOT), "-r", path)
    if "+cpu" not in pin and b"+cpu" in subprocess.check_output(
        [installer.python, "-c", "import importlib.metadata as m; print(m.version('torch'))"]
    ):
        fail(
            "the CPU build of torch was installed on a machine with a GPU.",
            "one of your package sources (find-links, extra-index-url) prefers it: take it out and run make setup",
        )


def set_up(venv, device):
    """Make or refresh the environment for `device`; do nothing where its stamp says that all is there."""
    pins, pyproject, stamp = (
        os.path.join(*p) for p in ((HERE, device + ".txt"), (ROOT, "pyproject.toml"), (venv, ".loraport"))
    )
    kind = "%s %s %s" % (device, sys.version.split()[0], ROOT)
    wanted = "%s\n%s\n" % (kind, fingerprint([pins, pyproject]))
    if read(stamp) == wanted:
        return
    installer = Installer(venv)
    sys.stderr.write(
        "setup: %s, Python %s, %s into %s (a minute or two)\n"
        % (device.upper(), sys.version.split()[0], "uv" if installer.uv else "pip", venv)
    )
    if read(stamp).split("\n")[0] != kind:
        installer.create(venv)
    install_pins(installer, pins)
    installer.install("loraport itself", "--no-build-isolation", "--editable", ROOT)
    with open(stamp, "w") as handle:
        handle.write(wanted)
    sys.stderr.write("setup: ready\n")


def add_tests(venv):
    """Put what tests and linters need into an environment that is set up."""
    pins, stamp = os.path.join(HERE, "test.txt"), os.path.join(venv, ".loraport-test")
    wanted = fingerprint([pins, os.path.join(venv, ".loraport")])
    if read(stamp) != wanted:
        Installer(venv).install("requirements/test.txt", "-r", pins)
        with open(stamp, "w") as handle:
            handle.write(wanted)


def main():
    """Bring the environment to what the pinned sets say."""
    check_python(sys.version_info)
    parser = argparse.ArgumentParser(description="Make the environment that Loraport runs in.")
    parser.add_argument("venv", help="folder of the environment")
    parser.add_argument("--test", action="store_true", help="also what the tests and the linters need")
    options = parser.parse_args()
    set_up(options.venv, detect_device())
    if options.test:
        add_tests(options.venv)


if __name__ == "__main__":
    main()
