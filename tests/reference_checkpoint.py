"""What real t5x computed (`reference/`), and its trees of arrays rearranged into ours, apart from `conversion`.

The files of `reference/` were written by google-research/t5x @ cc342d4. They are data.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from conversion import t5x
from conversion.stored import load

REFERENCE = Path(__file__).parent / "reference"


def load_arrays(name: str, file: str) -> dict[str, np.ndarray]:
    """`tests/reference/<name>/<file>` as a plain dict."""
    with np.load(REFERENCE / name / file) as stored:
        return {key: stored[key] for key in stored.files}


def load_info(name: str) -> dict[str, Any]:
    return json.loads((REFERENCE / name / "info.json").read_text())


def under(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The entries whose path starts with `prefix`, which is taken off: under(outputs, "plain/grad/")."""
    return {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}


def stack_layers(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """t5x's examples/t5 (layers_0, layers_1, ... by path) -> our tree: nested, layers stacked on axis 0."""
    grouped: dict[str, dict[int, np.ndarray]] = {}
    tree = {}
    for path, array in arrays.items():
        match = re.search(r"/layers_(\d+)/", path)
        if match:
            grouped.setdefault(path.replace(match[0], "/layers/"), {})[int(match[1])] = array
        else:
            tree[path] = array
    for path, layers in grouped.items():
        tree[path] = np.stack([layers[i] for i in range(len(layers))])
    return unflatten_dict({tuple(path.split("/")): array for path, array in tree.items()})


def unstack_scanned(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """t5x's examples/scalable_t5 (layer axis 1, split heads) -> our tree: layer axis 0, joined heads."""
    tree = {}
    for path, array in arrays.items():
        match = re.match(r"(encoder|decoder)/\1/(.*)", path)
        if match:
            layers = np.moveaxis(array, 1, 0)
            if re.search(r"/(query|key|value)/kernel$", path):  # [L, D, H, K]
                layers = layers.reshape(*layers.shape[:2], -1)
            elif path.endswith("/out/kernel"):  # [L, H, K, D]
                layers = layers.reshape(layers.shape[0], -1, layers.shape[-1])
            array, path = layers, f"{match[1]}/layers/{match[2]}"
        tree[path] = array
    return unflatten_dict({tuple(path.split("/")): array for path, array in tree.items()})


def reference_params(name: str) -> dict[str, Any]:
    """Our parameter tree of `t511_d64` or `scan_d64` at step 200."""
    return load(t5x.open(REFERENCE / name / "ckpt_legacy" / "checkpoint_200"))


def flat(tree: dict[str, Any]) -> dict[str, np.ndarray]:
    """A nested tree -> {"encoder/layers/...": array}."""
    return {"/".join(path): np.asarray(leaf) for path, leaf in flatten_dict(tree).items()}
