"""Stand-in for PYTHONPYCACHEPREFIX, which our processes do not hear: bytecode is kept in the
folder STANDIN_BYTECODE."""

import os
import sys

sys.pycache_prefix = os.environ["STANDIN_BYTECODE"]
sys.dont_write_bytecode = False
