"""The VIKHR_T5_* variables, from which commands and tasks take settings."""

import os


def own_variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("VIKHR_T5_")}
