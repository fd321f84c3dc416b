"""The model card: README.md of an exported model."""

from conversion.stored import StoredModel
from vikhr_t5 import __version__
from vikhr_t5.data.vocabulary import AnyVocabulary
from vikhr_t5.progress import human

_TEMPLATE = """\
---
library_name: transformers
pipeline_tag: text2text-generation
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
- Load the tokenizer with `AutoTokenizer`: the class `T5Tokenizer` builds another one from the same files.
- `spiece.model` is the SentencePiece model itself; `tokenizer.json` gives the same ids.
- Use float32 or bfloat16; float16 overflows in T5's feed-forward layers.
{untied}"""


_UNTIED = """\
- transformers 5.x warns that it will not tie the output layer to the embedding: that is right, this model has both. It
  does tie them when it builds a T5 from a configuration or resizes the embedding; `from_pretrained` keeps both.
"""


def text(model: StoredModel, vocabulary: AnyVocabulary, dtype: str, name: str) -> str:
    """README.md, in Markdown with the hub's front matter."""
    config = model.config
    tied = config.logits_via_embedding
    modes = ", ".join(f"`{token.removeprefix('▁')}`" for token in vocabulary.mode_tokens)
    return _TEMPLATE.format(
        name=name,
        kind="A T5 v1.0 encoder-decoder" if tied else "A T5 v1.1 encoder-decoder",
        parameters=human(config.param_count()),
        version=__version__,
        step=model.step,
        dtype=dtype,
        config=config,
        activations=" × ".join(config.mlp_activations),
        head="the embedding, scaled" if tied else "its own",
        vocabulary=vocabulary,
        rows=config.known_vocab_size(),
        last=vocabulary.num_sentinels - 1,
        first_sentinel=vocabulary.first_sentinel,
        untied="" if tied else _UNTIED,
        modes=f"\n- Mode tokens, the first id of an input: {modes}." if modes else "",
    )
