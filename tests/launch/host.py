"""The command `avocado` of a rehearsal host: CPU devices in the order of a TPU slice.

Devices take the order DEVICE_ORDER. Compiled programs that the persistent cache lacks are named on stderr.
"""

import json
import logging
import os
import sys
from pathlib import Path

from jax._src import cache_key

from avocado_jax.__main__ import main

sys.path.append(str(Path(__file__).parents[1]))

from device_order import reorder

# All processes of a TPU slice compute the same key. The fingerprint of a CPU topology depends on the process, so that
# processes other than 0, which alone writes, would find nothing.
cache_key._hash_accelerator_config = cache_key._hash_devices

if __name__ == "__main__":
    reorder(json.loads(os.environ["DEVICE_ORDER"]))
    compiler, misses = logging.getLogger("jax._src.compiler"), logging.StreamHandler()
    misses.addFilter(lambda record: "COMPILATION CACHE MISS" in record.getMessage())
    compiler.addHandler(misses)
    compiler.setLevel(logging.DEBUG)
    compiler.propagate = False
    sys.exit(main())
