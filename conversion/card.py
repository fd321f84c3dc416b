"""The model card: README.md of an exported model."""

import re
from pathlib import Path

from conversion.stored import StoredModel
from vikhr_t5 import __version__
from vikhr_t5.data.vocabulary import AnyVocabulary, Vocabulary
from vikhr_t5.files import records
from vikhr_t5.progress import human

_TEMPLATE = """\
---
library_name: transformers
{license}pipeline_tag: text2text-generation
tags:
- t5
- vikhr-t5
---

# {name}

{kind} with {parameters} parameters, trained with vikhr-t5 {version} for {step:,} steps and exported in {dtype}.

| | |
|---|---|
| layers | {config.num_encoder_layers} encoder, {config.num_decoder_layers} decoder |
| width, heads, head width, feed-forward | {config.emb_dim}, {config.num_heads}, {config.head_dim}, {config.mlp_dim} |
| feed-forward | {activations} |
| output layer | {head} |
| vocabulary | {vocabulary.size:,} ids, of them {vocabulary.num_sentinels} sentinels; padded to {rows:,} rows |

## Use

```python
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForSeq2SeqLM.from_pretrained("{name}")
inputs = tokenizer("Москва — столица <extra_id_0>.", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))
```

- Sentinels are `<extra_id_0>` to `<extra_id_{last}>`, ids {first_sentinel} downwards.{modes}
{tokenizer}- Use float32 or bfloat16; float16 overflows in T5's feed-forward layers.
{untied}{recipe}"""


_SENTENCEPIECE = """\
- Load the tokenizer with `AutoTokenizer`: the class `T5Tokenizer` builds another one from the same files.
- `spiece.model` is the SentencePiece model itself; `tokenizer.json` gives the same ids.
"""
_UMT5 = """\
- transformers 5.x multiplies the logits of every umT5 by {factor:.4g}, which 4.x does for tied ones only. The order of
  the tokens is the same; for probabilities, divide the logits by it.
"""
_UNTIED = """\
- transformers 5.x warns that it will not tie the output layer to the embedding: that is right, this model has both. It
  does tie them when it builds a T5 from a configuration or resizes the embedding; `from_pretrained` keeps both.
"""


def text(
    model: StoredModel, vocabulary: AnyVocabulary, dtype: str, name: str, license: str | None = None, recipe: str = ""
) -> str:
    """README.md, in Markdown with the hub's front matter.

    Args:
        license: the hub's name of one, such as "apache-2.0"; None: the card says none.
        recipe: a section on the training, see `recipe`.
    """
    config = model.config
    tied, umt5 = config.logits_via_embedding, config.relative_bias_per_layer
    modes = ", ".join(f"`{token}`" for token in vocabulary.mode_tokens)
    return _TEMPLATE.format(
        name=name,
        kind="A umT5 encoder-decoder" if umt5 else f"A T5 v1.{0 if tied else 1} encoder-decoder",
        parameters=human(config.param_count()),
        version=__version__,
        step=model.step,
        dtype=dtype,
        config=config,
        activations=" × ".join(config.mlp_activations),
        head="the embedding, scaled" if tied else "its own",
        vocabulary=vocabulary,
        rows=config.known_vocab_size(),
        last=vocabulary.first_sentinel - vocabulary.last_sentinel,
        first_sentinel=vocabulary.first_sentinel,
        license=f"license: {license}\n" if license else "",
        recipe=recipe,
        tokenizer=_SENTENCEPIECE if isinstance(vocabulary, Vocabulary) else "",
        untied="" if tied else _UNTIED + (_UMT5.format(factor=config.emb_dim**-0.5) if umt5 else ""),
        modes=f"\n- Mode tokens, the first id of an input: {modes}." if modes else "",
    )


def recipe(checkpoint: Path, step: int) -> str:
    """What a checkpoint of ours and its run folder say of the training: data, configuration, the last evaluation.

    Args:
        checkpoint: <run>/checkpoints/<step>, or a converted one, of which nothing is known.
        step: the checkpoint's.
    """
    config = checkpoint / "config.gin"
    text = config.read_text(encoding="utf-8") if config.is_file() else ""
    data = re.search(r"^MIXTURE_OR_TASK_NAME = '(.+)'", text, re.MULTILINE)
    if not data:
        return ""
    lines = ["", "## Training", "", f"Data: the seqio mixture `{data[1]}`.", ""]
    metrics = _last_evaluation(checkpoint.parents[1] / "metrics.jsonl", step)
    if metrics:
        lines += ["| evaluation at the last step | |", "|---|---|"]
        lines += [f"| {name} | {value:.4g} |" for name, value in metrics.items()]
        lines += [""]
    lines += ["<details><summary>config.gin</summary>", "", "```", text.strip(), "```", "", "</details>"]
    return "\n".join(lines) + "\n"


def _last_evaluation(file: Path, step: int) -> dict[str, float]:
    found = [record for record in records(file) if record.get("kind") == "eval" and record["step"] <= step]
    return {k: v for k, v in found[-1].items() if k.startswith(("loss", "accuracy"))} if found else {}
