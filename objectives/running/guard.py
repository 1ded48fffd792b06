"""A process that leads the ranks' process group and kills it when the tuner is gone, however the tuner ended.

The tuner holds the other end of this process's standard input and never writes to it: the read below returns
only when the tuner has exited, SIGKILL included, since the kernel then closes its end. Run as a script with
`python -I -S`: it must start in milliseconds and needs nothing but the two modules named here.
"""

import os
import signal


def main() -> None:
    os.read(0, 1)
    os.killpg(os.getpgrp(), signal.SIGKILL)  # this process included


if __name__ == "__main__":
    main()
