"""`vikhr-t5` for the commands of the documentation: what they say, with a model and a vocabulary of the smallest size.

python tests/docs/small.py train --gin_file=recipes/vikhr_t5_240m_ul2.gin …
"""

import sys

from vikhr_t5 import cli

MODEL = {"emb_dim": 32, "num_heads": 2, "head_dim": 16, "mlp_dim": 64, "num_encoder_layers": 2, "num_decoder_layers": 2}
BINDINGS = {
    **{f"network.T5Config.{name}": value for name, value in MODEL.items()},
    "BATCH_SIZE": 4,
    "EVAL_STEPS": 1,
    "step.Trainer.num_microbatches": 1,
}
STEPS = {"demo.gin": 44, "demo_finetune.gin": 48}  # 40 are the warm-up of the first


def smaller(arguments: list[str]) -> list[str]:
    """A vocabulary of 1,500 pieces in place of a larger one; of training, as few steps."""
    command = arguments[:2]
    if command == ["vocab", "train"]:
        return [*arguments[: arguments.index("--size") + 1], "1500", *arguments[arguments.index("--size") + 2 :]]
    if command[0] != "train":
        return arguments
    recipe = next(argument.rpartition("/")[2] for argument in arguments if argument.startswith("--gin_file="))
    bindings = {**BINDINGS, "TRAIN_STEPS": STEPS.get(recipe, 4)}
    return [*arguments, *(f"--gin.{name}={value}" for name, value in bindings.items())]


if __name__ == "__main__":
    sys.exit(cli.main(smaller(sys.argv[1:])))
