"""How much of the whole is done, and which part: a rotating share in a run of the tests, all of it by hand.

SURVIVAL_SHARE is a number from 0 to 1, SURVIVAL_SEED says which share; unset, it is another one each day.
"""

import os
from datetime import UTC, datetime

SHARE = float(os.environ.get("SURVIVAL_SHARE", "0.1"))
SEED = int(os.environ.get("SURVIVAL_SEED", datetime.now(UTC).toordinal()))
LANES = os.cpu_count() or 1
"""Services that are tried beside each other."""
