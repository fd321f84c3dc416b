"""`vikhr-t5 playground`: a page on which a model can be tried."""

import argparse

from vikhr_t5.command_line import add_command
from vikhr_t5.packages import require


def add_commands(commands: argparse._SubParsersAction) -> None:
    """The command, with its flags."""
    parser = add_command(
        commands,
        "playground",
        _playground,
        "serve a local page on which a model can be tried",
        "vikhr-t5 playground runs/demo/instruct",
    )
    parser.add_argument("model_dir", metavar="MODEL_DIR", help="a run, a checkpoint, or a folder of Hugging Face")
    parser.add_argument("--host", default="127.0.0.1", metavar="H", help="address to listen on (this machine alone)")
    parser.add_argument("--port", type=int, default=7860, metavar="N", help="of the page (7860)")
    parser.add_argument("--device", metavar="D", help="of a causal model: cpu, cuda (default: a GPU if there is one)")


def _playground(flags: argparse.Namespace) -> None:
    require("playground", "gradio")
    from vikhr_t5 import playground

    playground.launch(flags.model_dir, flags.host, flags.port, flags.device)
