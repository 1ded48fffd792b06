"""The ways to start ranks, by name. Another one (a host file, Slurm) is a module beside this one and a row here."""

from collections.abc import Callable

from ds_tune.objectives.machine import Machine
from ds_tune.objectives.running.launcher import Launcher
from ds_tune.objectives.running.local_launcher import LocalLauncher

LAUNCHERS: dict[str, Callable[[Machine], Launcher]] = {"local": LocalLauncher}

DEFAULT_LAUNCHER = "local"
