"""The process that lends Mooncake Store its memory: sets up a segment and stays."""

from __future__ import annotations

import sys
import time

from mooncake.store import MooncakeDistributedStore

store = MooncakeDistributedStore()
host, metadata, master, segment = sys.argv[1:]
code = store.setup(host, metadata, int(segment), 64 << 20, "tcp", "", master)
if code:
    raise SystemExit(f"mooncake setup: {code}")
print("@ready", flush=True)
while True:
    time.sleep(3600)
