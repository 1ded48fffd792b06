"""Waits for ever before it trains, as for a file that nobody writes."""

import sys
import time

print("waiting for the data", file=sys.stderr)
while True:
    time.sleep(60)
