"""One of several processes of a `tiny_run`: python tests/tiny_hosts.py RUN_DIR '{"total_steps": 20, …}' --process_…"""

import argparse
import json

from vikhr_t5 import hosts

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir")
    parser.add_argument("arguments", type=json.loads)
    parser.add_argument("--debug", action="store_true")
    hosts.add_flags(parser)
    flags = parser.parse_args()
    hosts.supervised("tiny")
    with hosts.connected(flags, "tiny"):
        from tiny_run import run

        run(flags.run_dir, **flags.arguments)
